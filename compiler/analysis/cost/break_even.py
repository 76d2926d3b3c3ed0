"""Dense or skipping zeros: what both take, per shape and target, measured with what the backend generates and remembered among the records.

A layer of ``rows`` x [``inputs`` -> ``outputs``] is timed dense, and skipping at several densities (the part of the inputs that some row
of a tile has). Weights of a model that is larger than the caches come from memory each time (``cold``): then both are timed so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from thresher.analysis.cost.cost import MachineModel
from thresher.frontend.capture import capture
from thresher.tuning.records import Record

if TYPE_CHECKING:
    from thresher.backends.base import Backend

ops = torch.ops.thresher
Kind = Literal["input", "gate", "rows", "panels", "runs"]
PRUNED = ("rows", "panels", "runs")
WIDE, RUN = 32, 16  # outputs of a panel, inputs of a run
DENSITIES = (0.01, 0.1, 0.3, 0.6, 1.0)
LEFT = (
    0.05,
    0.7,
)  # the same for what is left of a weight: each needs a kernel of its own, and no more than the last is asked for
ROUNDS = 7
WORTH = 0.85  # of the dense layer's time, that a layer may take to be chosen: a measurement of a few calls is no better than that
KERNELS = 2  # the version of those that are timed: records of another are for other code
FLUSH = 64 << 20  # bytes that are written to empty the caches
CACHED = 8 << 20  # bytes of weights that stay in the caches between two runs
FEW = 8  # rows for which skipping saves memory in order


@dataclass(frozen=True)
class Layer:
    """``kind``: whether zeros of the input are skipped, outputs that a gate closes, or zeros of the weight, by the layout in which it is
    kept (``thresher.ops.pruned_linear``)."""

    kind: Kind
    rows: int
    inputs: int
    outputs: int
    cold: bool

    @property
    def workload(self) -> str:
        return f"skip zeros {KERNELS}/{self.kind}/{self.rows}x{self.inputs}x{self.outputs}/{'cold' if self.cold else 'hot'}"


@dataclass(frozen=True)
class BreakEven:
    """Seconds: ``dense``, and ``sparse`` at each of ``densities``."""

    dense: float
    sparse: tuple[float, ...]
    densities: tuple[float, ...] = DENSITIES
    measured: bool = True

    def at(self, density: float) -> float:
        """Seconds of the layer that skips, between the densities that were measured on a line."""
        below = max([i for i, d in enumerate(self.densities) if d <= density], default=0)
        above = min(below + 1, len(self.densities) - 1)
        a, b = self.densities[below], self.densities[above]
        part = 0.0 if above == below else min(1.0, max(0.0, (density - a) / (b - a)))
        return self.sparse[below] + part * (self.sparse[above] - self.sparse[below])

    def worth(self, density: float) -> bool:
        """Whether skipping is faster, and not by chance."""
        return self.at(density) < WORTH * self.dense

    @property
    def density(self) -> float:
        """From which on the layer stays dense; 1 if it never does."""
        steps = [i / 100 for i in range(1, 101)]
        return next((d for d in steps if not self.worth(d)), 1.0)

    def plan(self) -> str:
        return json.dumps({"dense": self.dense, "sparse": self.sparse, "densities": self.densities})

    @staticmethod
    def of(plan: str) -> BreakEven:
        raw = json.loads(plan)
        return BreakEven(raw["dense"], tuple(raw["sparse"]), tuple(raw["densities"]))


def estimated(layer: Layer, machine: MachineModel) -> BreakEven:
    """Where nothing can be measured: for a few rows by the memory that is read, for many by the arithmetic, a tenth of the dense layer's
    speed lost to the lists."""
    weights = 4.0 * layer.inputs * layer.outputs
    arithmetic = 2.0 * layer.rows * layer.inputs * layer.outputs / machine.flops
    dense = max(weights / machine.bandwidth, arithmetic) + machine.launch
    if layer.kind == "gate" and layer.rows > FEW:  # it has no kernel
        return BreakEven(dense, (dense,) * len(DENSITIES), measured=False)
    slower = {"rows": 2.5, "runs": 1.5}.get(layer.kind, 1.1)  # per element that counts
    return BreakEven(dense, tuple(slower * d * dense + 2 * machine.launch for d in DENSITIES), measured=False)


class _Dense(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.kind, self.layer = layer.kind, nn.Linear(layer.inputs, layer.outputs, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gate * self.layer(x) if self.kind == "gate" else self.layer(x)


class _Sparse(_Dense):
    """``density`` of the weight stay, in blocks of the layout."""

    def __init__(self, layer: Layer, density: float = 1.0):
        super().__init__(layer)
        high, wide = {"panels": (WIDE, 1), "runs": (1, RUN)}.get(layer.kind, (1, 1))
        blocks = torch.rand(-(-layer.outputs // high), -(-layer.inputs // wide)) < density
        mask = blocks.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: layer.outputs, : layer.inputs]
        with torch.no_grad():
            self.layer.weight *= mask

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.kind == "gate":
            return ops.gated_linear(x, weight, None, gate)
        return ops.sparse_linear(x, weight) if self.kind == "input" else ops.pruned_linear(x, weight, None, self.kind)


def measure(backend: Backend, target: str, layer: Layer) -> BreakEven:
    """In turn, the second fastest call of each. The numbers that the user's program draws stay the ones they would be."""
    with torch.random.fork_rng(devices=[]):
        return _timed(backend, target, layer)


def _timed(backend: Backend, target: str, layer: Layer) -> BreakEven:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(layer.rows, n, generator=generator) for n in (layer.inputs, layer.outputs))

    def lowered(module: nn.Module) -> Callable[[list[Tensor]], object]:
        return backend.lower(capture(module.eval(), (x, gate)).rounded(), target).run

    calls: dict[float | None, Callable[[], object]] = {None: partial(lowered(_Dense(layer)), [x, gate])}
    at = LEFT if layer.kind in PRUNED else DENSITIES
    if layer.kind in PRUNED:
        calls |= {d: partial(lowered(_Sparse(layer, d)), [x, gate]) for d in at}
    else:
        skipping = lowered(_Sparse(layer))
        for d in at:
            left = [v * (torch.rand(v.shape[1], generator=generator) < d) for v in (x, gate)]
            calls[d] = partial(skipping, [left[0], gate] if layer.kind == "input" else [x, left[1]])
    took: dict[float | None, list[float]] = {name: [] for name in calls}
    rubbish = np.zeros(
        FLUSH // 4 if layer.cold else 1, np.float32
    )  # not torch's: its threads would spin beside what is timed
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            rubbish += 1
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    fast = {
        name: sorted(times)[1] for name, times in took.items()
    }  # what else runs here makes calls slower, never faster
    return BreakEven(fast[None], tuple(fast[d] for d in at), at)


def record(layer: Layer, found: BreakEven, fingerprint: str) -> Record:
    return Record.now(fingerprint, layer.workload, found.plan(), 1e6 * found.sparse[0], 1e6 * found.dense)


def recorded(layer: Layer, plans: Mapping[str, str]) -> BreakEven | None:
    """What is on record, if it can be read."""
    try:
        return BreakEven.of(plans[layer.workload])
    except (KeyError, TypeError, ValueError):
        return None
