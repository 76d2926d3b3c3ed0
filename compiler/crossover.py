"""Dense or skipping zeros: what both take, per shape and target, measured with what the backend generates and remembered among the records.

A layer of ``rows`` x [``inputs`` -> ``outputs``] is timed dense, and skipping at several densities (the part of the inputs that some row
of a tile has). Weights of a model that is larger than the caches come from memory each time (``cold``): then both are timed so.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from thresher.analysis.cost import Machine
from thresher.capture import capture
from thresher.records import Record

if TYPE_CHECKING:
    from thresher.backends.base import Backend

ops = torch.ops.thresher
Kind = Literal["input", "gate"]
DENSITIES = (0.01, 0.1, 0.3, 0.6, 1.0)
ROUNDS = 7
FLUSH = 64 << 20  # bytes that are written to empty the caches
CACHED = 8 << 20  # bytes of weights that stay in the caches between two runs
FEW = 8  # rows for which skipping saves memory in order


@dataclass(frozen=True)
class Layer:
    """``kind``: whether zeros of the input are skipped, or outputs that a gate closes."""

    kind: Kind
    rows: int
    inputs: int
    outputs: int
    cold: bool

    @property
    def workload(self) -> str:
        return f"skip zeros/{self.kind}/{self.rows}x{self.inputs}x{self.outputs}/{'cold' if self.cold else 'hot'}"


@dataclass(frozen=True)
class Crossover:
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

    @property
    def density(self) -> float:
        """From which on the dense layer is faster; 1 if it never is."""
        steps = [i / 100 for i in range(1, 101)]
        return next((d for d in steps if self.at(d) >= self.dense), 1.0)

    def plan(self) -> str:
        return json.dumps({"dense": self.dense, "sparse": self.sparse, "densities": self.densities})

    @staticmethod
    def of(plan: str) -> Crossover:
        raw = json.loads(plan)
        return Crossover(raw["dense"], tuple(raw["sparse"]), tuple(raw["densities"]))


def estimated(layer: Layer, machine: Machine) -> Crossover:
    """Where nothing can be measured: for a few rows by the memory that is read, for many by the arithmetic, a tenth of the dense layer's
    speed lost to the lists."""
    weights = 4.0 * layer.inputs * layer.outputs
    arithmetic = 2.0 * layer.rows * layer.inputs * layer.outputs / machine.flops
    dense = max(weights / machine.bandwidth, arithmetic) + machine.launch
    if layer.kind == "gate" and layer.rows > FEW:
        return Crossover(dense, (dense,) * len(DENSITIES), measured=False)
    return Crossover(dense, tuple(1.1 * d * dense + 2 * machine.launch for d in DENSITIES), measured=False)


class _Dense(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.kind, self.layer = layer.kind, nn.Linear(layer.inputs, layer.outputs, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.layer(x) if self.kind == "input" else gate * self.layer(x)


class _Sparse(_Dense):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = self.layer.weight
        return ops.sparse_linear(x, weight) if self.kind == "input" else ops.gated_linear(x, weight, None, gate)


def measure(backend: Backend, target: str, layer: Layer) -> Crossover:
    """In turn, medians."""
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(layer.rows, n, generator=generator) for n in (layer.inputs, layer.outputs))
    dense, sparse = (
        backend.lower(capture(module(layer).eval(), (x, gate)).rounded(), target) for module in (_Dense, _Sparse)
    )
    calls: dict[float | None, Callable[[], object]] = {None: lambda: dense.run([x, gate])}
    for density in DENSITIES:
        kept = [v * (torch.rand(v.shape[1], generator=generator) < density) for v in (x, gate)]
        inputs = [kept[0], gate] if layer.kind == "input" else [x, kept[1]]
        calls[density] = lambda inputs=inputs: sparse.run(inputs)  # type: ignore[misc]
    took: dict[float | None, list[float]] = {name: [] for name in calls}
    rubbish = torch.zeros(FLUSH // 4 if layer.cold else 1)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            rubbish.add_(1)
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in took.items()}
    return Crossover(medians[None], tuple(medians[d] for d in DENSITIES))


def record(layer: Layer, found: Crossover, fingerprint: str) -> Record:
    return Record.now(fingerprint, layer.workload, found.plan(), 1e6 * found.sparse[0], 1e6 * found.dense)


def recorded(layer: Layer, plans: Mapping[str, str]) -> Crossover | None:
    """What is on record, if it can be read."""
    try:
        return Crossover.of(plans[layer.workload])
    except (KeyError, TypeError, ValueError):
        return None
