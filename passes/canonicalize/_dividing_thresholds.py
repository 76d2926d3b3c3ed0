"""Thresholds that are spelled with a division, by their patterns.

soft       x relu(1 - t / |x|)                                                  t > 0
groups     z relu(1 - t / |z|), |z| over the last dimension, kept               t > 0      (``thresher::group_shrink``)
garrote    x relu(1 - t^2 / x^2);  where(|x| > t, x - t^2 / x, 0)      t > 0      (Gao, 1998)

``t`` must be a positive number, or for the first two a positive constant; others stay as they are, because 0 / 0 is not 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Note
from thresher.rewriting.pattern import Match, matches

aten = torch.ops.aten
SHRINK, GROUP = torch.ops.thresher.shrink.default, torch.ops.thresher.group_shrink.default


def _gain(part: Any) -> Any:
    return aten.relu.default(aten.sub.Tensor(1, part))


def _share(size: Callable[[Any], Any]) -> Callable:
    """x relu(1 - c / size(x)), the quotient as a product with the reciprocal."""
    return lambda x, c: aten.mul.Tensor(x, _gain(aten.mul.Tensor(aten.reciprocal.default(size(x)), c)))


def _share_of_tensor(size: Callable[[Any], Any]) -> Callable:
    return lambda x, c: aten.mul.Tensor(x, _gain(aten.div.Tensor(c, size(x))))


def _norm(x: Any) -> Any:
    return aten.sqrt.default(aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x, 2), [-1], True))


def _vector_norm(x: Any) -> Any:
    return aten.linalg_vector_norm.default(x, 2, [-1], True)


def _of_pairs(x: Any, c: Any, dim: Any) -> Any:
    """The norm without its dimension, which comes back at the end."""
    norm = aten.sqrt.default(aten.sum.dim_IntList(aten.pow.Tensor_Scalar(x, 2), [-1]))
    return aten.mul.Tensor(x, aten.unsqueeze.default(_gain(aten.mul.Tensor(aten.reciprocal.default(norm), c)), dim))


def _garrote_where(x: Any, t: Any, c: Any, zero: Any) -> Any:
    quotient = aten.mul.Tensor(aten.reciprocal.default(x), c)
    return aten.where.self(aten.gt.Scalar(aten.abs.default(x), t), aten.sub.Tensor(x, quotient), zero)


def _square(x: Any) -> Any:
    return aten.mul.Tensor(x, x)


RULES: list[tuple[Callable, str]] = [
    *((make(size), kind) for make in (_share, _share_of_tensor) for size, kind in (
        (aten.abs.default, "soft"), (_norm, "group"), (_vector_norm, "group"),
    )),
    (_of_pairs, "group"),
    (_share(lambda x: aten.pow.Tensor_Scalar(x, 2)), "garrote"), (_share(_square), "garrote"), (_garrote_where, "garrote"),
]  # fmt: skip


def rewrite_dividing(program: Program) -> list[Note]:
    """Rewrite all of them in place; returns a note for each."""
    notes = []
    for pattern, kind in RULES:
        for match in list(matches(program, pattern)):
            t = _threshold(program, match, kind)
            if t is None:
                continue
            x, anchor = match.bound["x"], match.anchor
            if not isinstance(t, fx.Node):
                number = torch.tensor(t, dtype=torch.float64)
                t = program.add_constant(number, f"{anchor.name}_t", dtype_of(anchor), like=anchor)
            keep = "gt" if pattern is _garrote_where else "nle"
            target, args = (GROUP, (x, t)) if kind == "group" else (SHRINK, (x, t, kind, keep))
            anchor.replace_all_uses_with(program.insert_call(anchor, target, args, like=anchor))
            notes.append(Note.at(anchor, f"written as thresher::shrink ({kind})"))
    return notes


def _threshold(program: Program, match: Match, kind: str) -> float | fx.Node | None:
    """t, where it is a positive number or constant: with 0, 0 / 0 would not be 0."""
    c, rank = match.bound["c"], len(shape_of(match.anchor))
    if match.bound.get("dim", -1) % rank != rank - 1:  # the norm comes back along another dimension
        return None
    if kind != "garrote":
        value = torch.as_tensor(c) if isinstance(c, (int, float)) else program.constant(c)
        return c if value is not None and bool((value > 0).all()) else None
    if not isinstance(c, (int, float)) or c <= 0:
        return None
    t, zero = match.bound.get("t"), match.bound.get("zero")
    if t is None:
        return math.sqrt(c)
    filler = zero if isinstance(zero, (int, float)) else program.constant(zero)
    if filler is None or bool(torch.as_tensor(filler).any()):
        return None
    return t if isinstance(t, (int, float)) and math.isclose(t * t, c, rel_tol=1e-15) else None
