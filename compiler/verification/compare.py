"""Comparison: of programs in float64 (exact passes), and of compiled results with the eager model (lowering).

Every error is relative to the scale of the reference output (its largest finite magnitude), so that one number means the
same for logits and for probabilities. NaN and infinities must be in the same places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.ir.nodes import is_tensor
from thresher.ir.program import Program
from thresher.runtime.comparison import EXACT_TOLERANCE as EXACT_TOLERANCE  # the public name
from thresher.runtime.comparison import TOLERANCE, Divergence, compare

#: The tolerances of :mod:`thresher.runtime.comparison` by torch's dtypes.
LOWERING_TOLERANCE = {getattr(torch, name): tolerance for name, tolerance in TOLERANCE.items()}


# ---------------------------------------------------------------------- programs in float64


@dataclass
class Observed:
    """A program with its outputs on its probes, for comparison with a later version of it."""

    program: Program
    probes: list[tuple] = field(default_factory=list)
    outputs: list[list] = field(default_factory=list)


def probes(program: Program, seed: int = 0) -> list[tuple]:
    """Return two lists of flat inputs: the user's example, and a random one of the same shapes.

    The columns of the random one differ in scale by powers of four; integers are the example's, in another order.
    """
    generator = torch.Generator().manual_seed(seed)
    random = tuple(_random_like(v, generator) for v in program.probe)
    return [program.probe, random]


def _random_like(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.dim() > 1:
            steps = torch.arange(value.shape[-1], dtype=torch.float64) % 3 - 1
            noise = noise * 4.0**steps
        scale = value.double().std().item() if value.numel() > 1 else 1.0
        return (noise * (scale if scale > 0 else 1.0)).to(value.dtype)
    if value.dtype is torch.bool or value.numel() == 0:
        return value.clone()
    order = torch.randperm(
        value.numel(), generator=generator
    )  # integers may be indices: only values already seen are safe
    return value.flatten()[order].reshape(value.shape)


def observe(program: Program) -> Observed:
    """Run ``program`` in float64 on its probes."""
    inputs = probes(program)
    return Observed(program, inputs, [program.run(*flat, dtype=torch.float64) for flat in inputs])


def compare_programs(before: Observed, after: Program) -> Divergence:
    """Return the worst float64 divergence of ``after`` over the probes of ``before``."""
    divergences = [
        compare(expected, after.run(*flat, dtype=torch.float64))
        for flat, expected in zip(before.probes, before.outputs)
    ]
    return max(divergences, key=lambda d: (bool(d.reason), d.relative))


def first_divergence(before: Program, after: Program, tolerance: float) -> fx.Node | None:
    """Return the first node of ``after`` whose value differs from that of the node with its name and shape in ``before``; else None."""
    values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and node.op == "call_function":
            values[node.name] = value

    suspects: list[fx.Node] = []

    def check(node: fx.Node, value: Any) -> None:
        known = values.get(node.name)
        if (
            known is not None
            and is_tensor(node)
            and known.shape == value.shape
            and compare([known], [value]).exceeds(tolerance)
        ):
            suspects.append(node)

    before.run(*before.probe, dtype=torch.float64, watch=keep)
    after.run(*before.probe, dtype=torch.float64, watch=check)
    return suspects[0] if suspects else None
