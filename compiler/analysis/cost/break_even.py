"""The break-even point of skipping zeros: the seconds that a layer takes dense, and skipping at several densities.

A layer of ``rows`` x [``inputs`` -> ``outputs``] is timed dense, and skipping at several densities (the fraction of the inputs that some
row of a tile has). Weights of a model that is larger than the caches come from memory each time (``cold``): then both are timed so.
``thresher.driver.measure_break_even`` measures them; here they are estimated, interpolated, and turned into records and back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.cost import MachineModel
from thresher.tuning.records import Record

Kind = Literal["input", "gate", "rows", "panels", "runs"]
PRUNED = ("rows", "panels", "runs")
PANEL_OUTPUTS, RUN_INPUTS = 32, 16  # outputs of a panel, inputs of a run
DENSITIES = (0.01, 0.1, 0.3, 0.6, 1.0)
#: The same for pruned weights: each needs a kernel of its own, and no weight that is denser than the last is asked for.
PRUNED_DENSITIES = (0.05, 0.7)
#: A layer is chosen below this fraction of the dense layer's time: a measurement of a few calls is no better than that.
WORTHWHILE_FRACTION = 0.85
KERNEL_VERSION = 2  # of the kernels that are timed: records of another version are for other code
CACHED_BYTES = 8 << 20  # of weights that stay in the caches between two runs
MAX_MEMORY_BOUND_ROWS = 8  # rows up to which skipping saves memory traffic; more rows are bound by the arithmetic


@dataclass(frozen=True)
class Layer:
    """The shape of a linear layer whose zeros could be skipped.

    ``kind``: ``input`` skips zeros of the input, ``gate`` outputs that a gate closes, and the others zeros of the weight, by the layout in
    which it is kept (``thresher.ops.pruned_linear``). ``cold``: the weight comes from memory in each run.
    """

    kind: Kind
    rows: int
    inputs: int
    outputs: int
    cold: bool

    @property
    def workload(self) -> str:
        """The name under which the break-even point is recorded."""
        temperature = "cold" if self.cold else "hot"
        return f"skip zeros {KERNEL_VERSION}/{self.kind}/{self.rows}x{self.inputs}x{self.outputs}/{temperature}"


@dataclass(frozen=True)
class BreakEven:
    """The seconds that a layer takes: ``dense``, and ``sparse`` at each of ``densities``."""

    dense: float
    sparse: tuple[float, ...]
    densities: tuple[float, ...] = DENSITIES
    measured: bool = True

    def at(self, density: float) -> float:
        """Return the seconds of the layer that skips, linear between the densities that were measured."""
        below = max([i for i, d in enumerate(self.densities) if d <= density], default=0)
        above = min(below + 1, len(self.densities) - 1)
        a, b = self.densities[below], self.densities[above]
        fraction = 0.0 if above == below else min(1.0, max(0.0, (density - a) / (b - a)))
        return self.sparse[below] + fraction * (self.sparse[above] - self.sparse[below])

    def worthwhile(self, density: float) -> bool:
        """Return whether skipping is faster, and not by chance."""
        return self.at(density) < WORTHWHILE_FRACTION * self.dense

    @property
    def density(self) -> float:
        """The density from which on the layer stays dense, in steps of 0.01; 1 if it never does."""
        steps = [i / 100 for i in range(1, 101)]
        return next((d for d in steps if not self.worthwhile(d)), 1.0)


def estimated(layer: Layer, machine: MachineModel) -> BreakEven:
    """Estimate the break-even point, for where nothing can be measured.

    For a few rows by the memory that is read, for many by the arithmetic, a tenth of the dense layer's speed lost to the lists.
    """
    weight_bytes = 4.0 * layer.inputs * layer.outputs
    arithmetic = 2.0 * layer.rows * layer.inputs * layer.outputs / machine.flops
    dense = max(weight_bytes / machine.bandwidth, arithmetic) + machine.launch
    if layer.kind == "gate" and layer.rows > MAX_MEMORY_BOUND_ROWS:  # it has no kernel
        return BreakEven(dense, (dense,) * len(DENSITIES), measured=False)
    slowdown = {"rows": 2.5, "runs": 1.5}.get(layer.kind, 1.1)  # per element that counts
    return BreakEven(dense, tuple(slowdown * d * dense + 2 * machine.launch for d in DENSITIES), measured=False)


def record(layer: Layer, times: BreakEven, fingerprint: str) -> Record:
    """Return the record of a measured break-even point; its plan is ``times`` as JSON."""
    plan = json.dumps({"dense": times.dense, "sparse": times.sparse, "densities": times.densities})
    return Record.now(fingerprint, layer.workload, plan, 1e6 * times.sparse[0], 1e6 * times.dense)


def recorded(layer: Layer, plans: Mapping[str, str]) -> BreakEven | None:
    """Return the break-even point on record for a layer; None where there is none that can be read."""
    try:
        plan = json.loads(plans[layer.workload])
        return BreakEven(plan["dense"], tuple(plan["sparse"]), tuple(plan["densities"]))
    except (KeyError, TypeError, ValueError):
        return None
