"""Comparison: of programs in float64 (exact passes), and of compiled results with the eager model (lowering).

Every error is relative to the scale of the reference output (its largest finite magnitude), so that one number means the
same for logits and for probabilities. NaN and infinities must be in the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A program's outputs on its probes: what a later version of it is compared with."""

    program: Program
    probes: list[tuple] = field(default_factory=list)
    outputs: list[list] = field(default_factory=list)


def probes(program: Program, seed: int = 0) -> list[tuple]:
    """The user's example, and a random one of the same shapes whose rows differ in scale by powers of four."""
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
    """The worst float64 divergence of ``after`` over the probes of ``before``."""
    found = [
        compare(expected, after.run(*flat, dtype=torch.float64))
        for flat, expected in zip(before.probes, before.outputs)
    ]
    return max(found, key=lambda d: (bool(d.reason), d.relative))


def first_divergence(before: Program, after: Program, tolerance: float) -> fx.Node | None:
    """The first node of ``after`` whose value differs from that of the node with its name and shape in ``before``."""
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


# ---------------------------------------------------------------------- choices that rounding makes

aten, ops = torch.ops.aten, torch.ops.thresher
#: Operators whose result jumps: who is first, who merges with whom, what is looked at, what is kept.
CHOICES = (
    aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim,
    ops.token_sides.default, ops.match_tokens.default, ops.select_blocks.default, ops.shrink.default,
)  # fmt: skip
JUMPS = ("hard", "above")  # of thresholds: the others are continuous, and rounding moves them by no more than itself
NUDGE = 1e-5  # of a value, as a part of itself: more than rounding does


def undecided(program: Program, flat: Sequence[Any]) -> fx.Node | None:
    """The first choice that comes out differently in float64, or for inputs that differ by rounding: there a compiled program may rightly
    differ from its reference."""
    if not any(map(_jumps, program.calls(*CHOICES))):
        return None
    wanted = _choices(program, flat, torch.float64)
    generator = torch.Generator().manual_seed(0)
    runs = [_choices(program, flat, None)]
    runs += [_choices(program, [_nudged(v, generator) for v in flat], torch.float64) for _ in range(2)]
    return next((n for n in wanted if any(not torch.equal(wanted[n], r[n]) for r in runs)), None)


MARGIN = 4  # of others that round may fall on the other side than those that do here


def steps(program: Program, flat: Sequence[Any]) -> float:
    """How far a compiled program may rightly be from its reference where values are rounded to whole numbers, as quantised models do: a
    value next to a half falls on either side of it, and all that follows moves by a step.

    MARGIN times the relative change of the outputs where all that is rounded is moved by NUDGE; 0 where nothing is rounded.
    """
    if not any(True for _ in program.calls(aten.round.default)):
        return 0.0
    wanted = program.run(*flat, dtype=torch.float64)
    moved = []
    for factor in (1 - NUDGE, 1 + NUDGE):
        work = program.clone()
        for node in list(work.calls(aten.round.default)):
            source = work.insert_call(node, aten.mul.Tensor, (node.args[0], factor))
            node.args = (source, *node.args[1:])
        moved.append(compare(wanted, work.run(*flat, dtype=torch.float64)).relative)
    return MARGIN * max(moved)


def _jumps(node: fx.Node) -> bool:
    return node.target in CHOICES and (node.target is not ops.shrink.default or node.args[2] in JUMPS)


def _choices(program: Program, flat: Sequence[Any], dtype: torch.dtype | None) -> dict[fx.Node, Tensor]:
    found: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if _jumps(node):
            results = value if isinstance(value, (tuple, list)) else [value]
            found[node] = torch.cat([(r != 0 if r.is_floating_point() else r).flatten() for r in results])

    program.run(*flat, dtype=dtype, watch=keep)
    return found


def _nudged(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (value.double() * (1 + NUDGE * noise)).to(value.dtype)
