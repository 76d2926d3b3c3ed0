"""Every spelling of thresholding becomes one ``thresher::shrink(x, t, kind)``.

soft       relu(x - t) - relu(-x - t);  sign(x) * relu(|x| - t);  x - clamp(x, -t, t);  where(|x| > t, x - sign(x) t, 0 x)  (softshrink)
hard       where(|x| > t, x, 0);  x * (|x| > t)  (hardshrink)
positive   relu(x - t)
above      where(x > t, x, 0);  x * (x > t)  (threshold with value 0)

``t`` is a number or a constant; a soft threshold needs t >= 0, else the spellings disagree and the site is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

import thresher.ops.shrink  # noqa: F401  (registers the operator)
from thresher.pass_manager import Context, Note, Pass, PassResult, register_pass
from thresher.program import Program, dtype_of, is_tensor, shape_of
from thresher.rewriter import Match, matches

aten = torch.ops.aten
SHRINK = torch.ops.thresher.shrink.default


def _soft_two_relu(x, t):
    return aten.sub.Tensor(
        aten.relu.default(aten.sub.Tensor(x, t)), aten.relu.default(aten.sub.Tensor(aten.neg.default(x), t))
    )


def _soft_sign(x, t):
    return aten.mul.Tensor(aten.sign.default(x), aten.relu.default(aten.sub.Tensor(aten.abs.default(x), t)))


def _soft_clamp(x, low, t):
    return aten.sub.Tensor(x, aten.clamp.default(x, low, t))


def _soft_decomposed(x, t):
    inside = aten.sub.Tensor(x, aten.mul.Tensor(aten.sign.default(x), t))
    return aten.where.self(aten.gt.Scalar(aten.abs.default(x), t), inside, aten.mul.Tensor(x, 0))


def _hard_where(x, t, zero):
    return aten.where.self(aten.gt.Scalar(aten.abs.default(x), t), x, zero)


def _hard_where_tensor(x, t, zero):
    return aten.where.self(aten.gt.Tensor(aten.abs.default(x), t), x, zero)


def _hard_where_inverse(x, t, zero):
    return aten.where.self(aten.le.Scalar(aten.abs.default(x), t), zero, x)


def _hard_product(x, t):
    return aten.mul.Tensor(x, aten.gt.Scalar(aten.abs.default(x), t))


def _positive(x, t):
    return aten.relu.default(aten.sub.Tensor(x, t))


def _above_where(x, t, zero):
    return aten.where.self(aten.gt.Scalar(x, t), x, zero)


def _above_inverse(x, t, zero):
    return aten.where.self(aten.le.Scalar(x, t), zero, x)


def _above_product(x, t):
    return aten.mul.Tensor(x, aten.gt.Scalar(x, t))


def _threshold(x, t, zero):
    return aten.threshold.default(x, t, zero)


def _softshrink(x, t):
    return aten.softshrink.default(x, t)


def _hardshrink(x, t):
    return aten.hardshrink.default(x, t)


RULES: list[tuple[Callable, str]] = [
    (_soft_two_relu, "soft"), (_soft_sign, "soft"), (_soft_clamp, "soft"), (_soft_decomposed, "soft"), (_softshrink, "soft"),
    (_hard_where, "hard"), (_hard_where_tensor, "hard"), (_hard_where_inverse, "hard"), (_hard_product, "hard"), (_hardshrink, "hard"),
    (_above_where, "above"), (_above_inverse, "above"), (_above_product, "above"), (_threshold, "above"),
    (_positive, "positive"),
]  # fmt: skip


@register_pass
@dataclass(frozen=True)
class CanonicalizeThreshold(Pass):
    """Write every soft, hard and one-sided threshold as thresher::shrink."""

    name: ClassVar[str] = "canonicalize-threshold"
    requires: ClassVar[tuple[str, ...]] = ("simplify",)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes, refusals = program.clone(), [], []
        for pattern, kind in RULES:
            for match in list(matches(work, pattern)):
                node = match.anchor
                reason = _check(work, match, kind)
                if reason:
                    refusals.append(Note.at(node, reason))
                    continue
                _rewrite(work, match, kind)
                notes.append(Note.at(node, f"written as thresher::shrink ({kind})"))
        return PassResult(work.clean(), notes, refusals) if notes else PassResult(program, [], refusals)


def _check(program: Program, match: Match, kind: str) -> str:
    """Why the match cannot be rewritten, or an empty string."""
    x, t, zero, low = (match.bound.get(k) for k in ("x", "t", "zero", "low"))
    if not is_tensor(x) or not dtype_of(x).is_floating_point:
        return "the thresholded value is not a floating-point tensor"
    value = t if isinstance(t, (int, float)) else program.constant(t)
    if value is None:
        return "the threshold is not constant"
    if "low" in match.bound and (not isinstance(low, (int, float)) or not isinstance(t, (int, float)) or low != -t):
        return "the clamp is not symmetric"
    if "zero" in match.bound:
        filler = zero if isinstance(zero, (int, float)) else program.constant(zero)
        if filler is None or bool(torch.as_tensor(filler).any()):
            return "what is put below the threshold is not 0"
    if kind == "soft" and bool((torch.as_tensor(value) < 0).any()):
        return "a negative soft threshold has no single meaning"
    if isinstance(value, Tensor) and torch.broadcast_shapes(value.shape, shape_of(x)) != torch.Size(shape_of(x)):
        return "the threshold is larger than the value"
    return ""


def _rewrite(program: Program, match: Match, kind: str) -> None:
    x, t = match.bound["x"], match.bound["t"]
    if not isinstance(t, fx.Node):
        t = program.add_constant(
            torch.tensor(float(t), dtype=torch.float64), f"{match.anchor.name}_t", dtype_of(x), like=match.anchor
        )
    new = program.insert_call(match.anchor, SHRINK, (x, t, kind), like=match.anchor)
    match.anchor.replace_all_uses_with(new)
    for node in sorted(match.inner, reverse=True):
        program.graph.erase_node(node)
