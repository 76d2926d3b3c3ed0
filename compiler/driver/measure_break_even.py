"""Measure the break-even point of skipping zeros with what the backend generates (``thresher.analysis.cost.break_even``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.cost.break_even import (
    DENSITIES,
    PANEL_OUTPUTS,
    PRUNED,
    PRUNED_DENSITIES,
    RUN_INPUTS,
    BreakEven,
    Layer,
)
from thresher.backends.base import Backend
from thresher.frontend.capture import capture
from thresher.tuning.timing import in_turn, seconds

ops = torch.ops.thresher
ROUNDS = 7
FLUSH_BYTES = 64 << 20  # written to empty the caches


class _Dense(nn.Module):
    def __init__(self, layer: Layer):
        super().__init__()
        self.kind, self.layer = layer.kind, nn.Linear(layer.inputs, layer.outputs, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gate * self.layer(x) if self.kind == "gate" else self.layer(x)


class _Sparse(_Dense):
    """The layer that skips; a fraction ``density`` of its weight stays, in blocks of the layout."""

    def __init__(self, layer: Layer, density: float = 1.0):
        super().__init__(layer)
        height, width = {"panels": (PANEL_OUTPUTS, 1), "runs": (1, RUN_INPUTS)}.get(layer.kind, (1, 1))
        blocks = torch.rand(-(-layer.outputs // height), -(-layer.inputs // width)) < density
        mask = blocks.repeat_interleave(height, 0).repeat_interleave(width, 1)[: layer.outputs, : layer.inputs]
        with torch.no_grad():
            self.layer.weight *= mask

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        weight = self.layer.weight
        if self.kind == "gate":
            return ops.gated_linear(x, weight, None, gate)
        return ops.sparse_linear(x, weight) if self.kind == "input" else ops.pruned_linear(x, weight, None, self.kind)


def measure(backend: Backend, target: str, layer: Layer) -> BreakEven:
    """Measure a layer dense and at each density, in turn: the second fastest call of each, in seconds.

    What else runs on the machine makes calls slower, never faster. The random numbers that the user's program draws stay as they were.
    """
    with torch.random.fork_rng(devices=[]):
        calls = _calls(backend, target, layer)
    # the bytes are not torch's: its threads would spin beside what is timed
    scratch = np.zeros(FLUSH_BYTES // 4 if layer.cold else 1, np.float32)

    def sample(call: Callable[[], object]) -> float:
        call()
        np.add(scratch, 1, out=scratch)
        return seconds(call)

    samples = in_turn({density: partial(sample, call) for density, call in calls.items()}, ROUNDS)
    times = {density: sorted(of_one)[1] for density, of_one in samples.items()}
    densities = tuple(d for d in times if d is not None)
    return BreakEven(times[None], tuple(times[d] for d in densities), densities)


def _calls(backend: Backend, target: str, layer: Layer) -> dict[float | None, Callable[[], object]]:
    """Return the calls to time by their density; None is the dense layer."""
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(layer.rows, n, generator=generator) for n in (layer.inputs, layer.outputs))

    def lowered(module: nn.Module) -> Callable[[list[Tensor]], object]:
        return backend.lower(capture(module.eval(), (x, gate)).rounded(), target).run

    calls: dict[float | None, Callable[[], object]] = {None: partial(lowered(_Dense(layer)), [x, gate])}
    if layer.kind in PRUNED:
        return calls | {d: partial(lowered(_Sparse(layer, d)), [x, gate]) for d in PRUNED_DENSITIES}
    skipping = lowered(_Sparse(layer))
    for d in DENSITIES:
        sparse_x, sparse_gate = (v * (torch.rand(v.shape[1], generator=generator) < d) for v in (x, gate))
        calls[d] = partial(skipping, [sparse_x, gate] if layer.kind == "input" else [x, sparse_gate])
    return calls
