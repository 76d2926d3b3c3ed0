"""Allow for what rounding decides: choices, and values rounded to whole numbers, in which a compiled program may rightly differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.ir.program import Program
from thresher.runtime.comparison import compare
from thresher.verification.truth import neighbour

aten, ops = torch.ops.aten, torch.ops.thresher
#: Operators whose result jumps: who is first, who merges with whom, what is looked at, what is kept.
CHOICES = (
    aten.topk.default, aten.sort.default, aten.argsort.default, aten.argmax.default, aten.argmin.default, aten.max.dim, aten.min.dim,
    ops.token_sides.default, ops.match_tokens.default, ops.select_blocks.default, ops.shrink.default,
)  # fmt: skip
DISCONTINUOUS_THRESHOLDS = (
    "hard",
    "above",
)  # the others are continuous, and rounding moves them by no more than itself
PERTURBATION = 1e-5  # of a value, relative to itself: more than rounding does
NEIGHBOURS = 4  # points at which the choice in float64 is compared with that in the program's own dtypes
SAFETY_FACTOR = 4  # so many times as many values may be rounded to the other side than are here


def find_undecided_choice(program: Program, flat: Sequence[Any]) -> fx.Node | None:
    """Return the first choice that rounding decides on the inputs ``flat``; None where there is none.

    Such a choice comes out differently in float64, on these inputs or on what is next to them and the constants
    (:func:`thresher.verification.truth.neighbour`), or for inputs that differ by PERTURBATION.
    """
    if not any(map(is_choice, program.calls(*CHOICES))):
        return None
    generator = torch.Generator().manual_seed(0)
    exact = _choices(program, flat, torch.float64)
    pairs = [(exact, _choices(program, [_perturbed(v, generator) for v in flat], torch.float64)) for _ in range(2)]
    for seed in range(NEIGHBOURS):
        near, inputs = neighbour(program, flat, seed)
        pairs.append((_choices(near, inputs, torch.float64), _choices(near, inputs, None)))
    return next((n for n in exact if any(not torch.equal(a[n], b[n]) for a, b in pairs)), None)


def rounding_allowance(program: Program, flat: Sequence[Any]) -> float:
    """Return how far a compiled program may be from its reference on ``flat``, relative to the scale of the output.

    Where values are rounded to whole numbers, as quantised models do, a value next to a half falls on either side of it, and all that
    follows moves by a step. The allowance is SAFETY_FACTOR times the relative change of the outputs where all that is rounded is moved by
    PERTURBATION; 0 where nothing is rounded.
    """
    if not any(True for _ in program.calls(aten.round.default)):
        return 0.0
    reference = program.run(*flat, dtype=torch.float64)
    changes = []
    for factor in (1 - PERTURBATION, 1 + PERTURBATION):
        scaled = program.clone()
        for node in list(scaled.calls(aten.round.default)):
            source = scaled.insert_call(node, aten.mul.Tensor, (node.args[0], factor))
            node.args = (source, *node.args[1:])
        changes.append(compare(reference, scaled.run(*flat, dtype=torch.float64)).relative)
    return SAFETY_FACTOR * max(changes)


def is_choice(node: fx.Node) -> bool:
    """Return whether the result of a call jumps where its inputs hardly change."""
    return node.target in CHOICES and (
        node.target is not ops.shrink.default or node.args[2] in DISCONTINUOUS_THRESHOLDS
    )


def _choices(program: Program, flat: Sequence[Any], dtype: torch.dtype | None) -> dict[fx.Node, Tensor]:
    """Return what each choice comes to: its indices, and for values whether they are zero."""
    choices: dict[fx.Node, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if is_choice(node):
            results = value if isinstance(value, (tuple, list)) else [value]
            choices[node] = torch.cat([(r != 0 if r.is_floating_point() else r).flatten() for r in results])

    program.run(*flat, dtype=dtype, watch=keep)
    return choices


def _perturbed(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (value.double() * (1 + PERTURBATION * noise)).to(value.dtype)
