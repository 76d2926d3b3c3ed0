"""Piecewise linear functions: a small part of a graph as a function of one value, element by element.

    f(x) = slope_i x + offset_i        between breakpoint i and i + 1

relu, abs, clamp, comparisons, ``where`` and their like are such functions, and so is whatever is made of them: two spellings of one
function have the same pieces. What happens *at* a breakpoint, and for NaN and infinities, the pieces do not say.

Constants are numbers, or multiples of one tensor ``unit`` (a threshold per channel, or computed in the graph). With a unit everything is in
its multiples, as if it were 1; for that each value must be of degree 1 (grow with x and the unit: x, t, |x| - t) or 0 (not so: sign(x),
x > t).
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
MAX_BREAKPOINTS = 12


class NotPiecewise(Exception):
    """An error that says that the graph computes something else."""


@dataclass(frozen=True)
class Piecewise:
    """A piecewise linear function.

    ``pieces[i]`` = (slope, offset) holds below ``breaks[i]`` and not below ``breaks[i - 1]``. ``degree``: 0, 1, or None for what is 0.
    """

    breaks: tuple[float, ...]
    pieces: tuple[tuple[float, float], ...]
    degree: int | None

    @staticmethod
    def number(value: float, degree: int | None) -> Piecewise:
        """Return a constant function."""
        return Piecewise((), ((0.0, float(value)),), None if value == 0 else degree)

    @property
    def is_step_function(self) -> bool:
        """True if the function is constant on every piece."""
        return all(slope == 0 for slope, _ in self.pieces)

    def at(self, x: float) -> tuple[float, float]:
        """Return the piece around ``x``, which is no breakpoint."""
        return self.pieces[bisect_right(self.breaks, x)]

    def simplified(self) -> Piecewise:
        """Return the function without breakpoints that separate equal pieces; raise NotPiecewise for more than MAX_BREAKPOINTS."""
        breaks: list[float] = []
        pieces = [self.pieces[0]]
        for point, piece in zip(self.breaks, self.pieces[1:]):
            if piece != pieces[-1]:
                breaks.append(point)
                pieces.append(piece)
        if len(breaks) > MAX_BREAKPOINTS:
            raise NotPiecewise("too many pieces")
        return Piecewise(tuple(breaks), tuple(pieces), self.degree)


def cut(values: list[Piecewise], *more: float) -> list[float]:
    """Return a point in every interval between all breakpoints, those in ``more`` too."""
    breaks = sorted({b for v in values for b in v.breaks} | set(more))
    if not breaks:
        return [0.5]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(breaks)]
    return [breaks[0] - 1.0, *inner, breaks[-1] + 1.0]


def combine(function: Callable[..., tuple[float, float]], values: list[Piecewise], degree: int | None) -> Piecewise:
    """Return the function whose pieces are ``function`` of the pieces (slope, offset) of ``values``, no two of which cross."""
    breaks = sorted({b for v in values for b in v.breaks})
    pieces = tuple(function(*(v.at(x) for v in values)) for x in cut(values))
    return Piecewise(tuple(breaks), pieces, degree).simplified()


def crossings(a: Piecewise, b: Piecewise) -> list[float]:
    """Return where a - b changes its sign inside a piece."""
    points = []
    for x in cut([a, b]):
        (s, o), (t, p) = a.at(x), b.at(x)
        if s != t:
            points.append((p - o) / (s - t))
    return points


def choose(
    first: Callable[[float, float], bool], a: Piecewise, b: Piecewise, then: Piecewise, other: Piecewise
) -> Piecewise:
    """Return the function that is ``then`` where ``first(a, b)``, else ``other``."""
    values, between = [a, b, then, other], crossings(a, b)
    breaks = sorted({x for v in values for x in v.breaks} | set(between))

    def piece(x: float) -> tuple[float, float]:
        (s, o), (t, p) = a.at(x), b.at(x)
        return then.at(x) if first(s * x + o, t * x + p) else other.at(x)

    return Piecewise(tuple(breaks), tuple(piece(x) for x in cut(values, *between)), _same(then, other)).simplified()


def _same(a: Piecewise, b: Piecewise) -> int | None:
    """Return the degree of a sum or a choice."""
    if a.degree is not None and b.degree is not None and a.degree != b.degree:
        raise NotPiecewise("values that grow with the unit meet others")
    return a.degree if a.degree is not None else b.degree


ZERO, ONE = Piecewise.number(0, None), Piecewise.number(1, 0)


def add(a: Piecewise, b: Piecewise, factor: float = 1.0) -> Piecewise:
    """Return a + factor b."""
    return combine(lambda p, q: (p[0] + factor * q[0], p[1] + factor * q[1]), [a, b], _same(a, b))


def subtract(a: Piecewise, b: Piecewise, factor: float = 1.0) -> Piecewise:
    """Return a - factor b."""
    return add(a, b, -factor)


def multiply(a: Piecewise, b: Piecewise) -> Piecewise:
    """Return a b, one of which must be a step function."""
    if not a.is_step_function:
        a, b = b, a
    if not a.is_step_function:
        raise NotPiecewise("a product of two values that both vary")
    degree = None if None in (a.degree, b.degree) else a.degree + b.degree  # type: ignore[operator]
    if degree is not None and degree > 1:
        raise NotPiecewise("a product of values that both grow")
    return combine(lambda p, q: (p[1] * q[0], p[1] * q[1]), [a, b], degree)


def divide(a: Piecewise, b: Piecewise) -> Piecewise:
    """Return a / b for a constant b."""
    if b.breaks or not b.is_step_function or b.degree == 1 or b.pieces[0][1] == 0:
        raise NotPiecewise("a quotient by something that varies")
    return multiply(a, Piecewise.number(1 / b.pieces[0][1], 0))


def relu(a: Piecewise) -> Piecewise:
    """Return max(a, 0)."""
    return choose(operator.gt, a, ZERO, a, ZERO)


def compare(first: Callable[[float, float], bool]) -> Callable[[Piecewise, Piecewise], Piecewise]:
    """Return the function of (a, b) that is 1 where ``first(a, b)``, else 0."""

    def of(a: Piecewise, b: Piecewise) -> Piecewise:
        _same(a, b)
        return choose(first, a, b, ONE, ZERO)

    return of


def absolute(a: Piecewise) -> Piecewise:
    """Return |a|."""
    return choose(operator.lt, a, ZERO, add(ZERO, a, -1), a)


def sign(a: Piecewise) -> Piecewise:
    """Return the sign of a: -1, 0 or 1."""
    return choose(operator.lt, a, ZERO, Piecewise.number(-1, 0), choose(operator.gt, a, ZERO, ONE, ZERO))


def largest(a: Piecewise, b: Piecewise) -> Piecewise:
    """Return max(a, b)."""
    return choose(operator.gt, a, b, a, b)


def smallest(a: Piecewise, b: Piecewise) -> Piecewise:
    """Return min(a, b)."""
    return choose(operator.lt, a, b, a, b)


def clamp(a: Piecewise, low: Piecewise | None = None, high: Piecewise | None = None) -> Piecewise:
    """Return min(max(a, low), high); a bound that is None does not count."""
    a = a if low is None else largest(a, low)
    return a if high is None else smallest(a, high)


def where(condition: Piecewise, a: Piecewise, b: Piecewise) -> Piecewise:
    """Return a where the condition is 1, and b where it is 0."""
    return choose(operator.gt, condition, Piecewise.number(0.5, 0), a, b)


def both(a: Piecewise, b: Piecewise) -> Piecewise:
    """Return a and b, of conditions."""
    return where(a, b, ZERO)


def soft(a: Piecewise, t: Piecewise) -> Piecewise:
    """Return the soft threshold, a - min(max(a, -t), t)."""
    return add(a, clamp(a, add(ZERO, t, -1), t), -1)


def hard(a: Piecewise, t: Piecewise) -> Piecewise:
    """Return the hard threshold: a where |a| > t, else 0."""
    return choose(operator.gt, absolute(a), t, a, ZERO)


#: What each operator does with piecewise values; numbers among the arguments are values of degree 1, but for factors.
OPERATORS: Mapping[Any, Callable[..., Piecewise]] = {
    aten.relu.default: relu, aten.abs.default: absolute, aten.sign.default: sign, aten.sgn.default: sign,
    aten.neg.default: lambda a: add(ZERO, a, -1),
    aten.add.Tensor: add, aten.sub.Tensor: subtract, aten.rsub.Scalar: lambda a, b: subtract(b, a),
    aten.mul.Tensor: multiply, aten.div.Tensor: divide,
    aten.clamp.default: clamp, aten.clamp.Tensor: clamp, aten.clamp_min.default: clamp, aten.hardtanh.default: clamp,
    aten.clamp_max.default: smallest, aten.maximum.default: largest, aten.minimum.default: smallest,
    aten.gt.Scalar: compare(operator.gt), aten.gt.Tensor: compare(operator.gt),
    aten.ge.Scalar: compare(operator.ge), aten.ge.Tensor: compare(operator.ge),
    aten.lt.Scalar: compare(operator.lt), aten.lt.Tensor: compare(operator.lt),
    aten.le.Scalar: compare(operator.le), aten.le.Tensor: compare(operator.le),
    aten.logical_not.default: lambda a: add(ONE, a, -1), aten.bitwise_not.default: lambda a: add(ONE, a, -1),
    aten.logical_and.default: both, aten.bitwise_and.Tensor: both,
    aten.logical_or.default: lambda a, b: where(a, ONE, b), aten.bitwise_or.Tensor: lambda a, b: where(a, ONE, b),
    aten.where.self: where,
    aten.masked_fill.Scalar: lambda a, m, v: where(m, v, a), aten.masked_fill.Tensor: lambda a, m, v: where(m, v, a),
    aten._to_copy.default: lambda a: a, aten.softshrink.default: soft, aten.hardshrink.default: hard,
    aten.threshold.default: lambda a, t, v: choose(operator.gt, a, t, a, v),
}  # fmt: skip
#: Those that can make a breakpoint.
KINKS = OPERATORS.keys() - {
    aten.neg.default, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor, aten._to_copy.default,
}  # fmt: skip
DEFAULTS = {aten.softshrink.default: (0.5,), aten.hardshrink.default: (0.5,), aten.hardtanh.default: (-1.0, 1.0)}
FACTORS = (aten.mul.Tensor, aten.div.Tensor)  # whose numbers do not grow with the unit
IGNORED_KEYWORDS = ("dtype",)  # keyword arguments that do not matter


@dataclass(frozen=True)
class Leaf:
    """A number, or a multiple of the unit."""

    value: float
    in_units: bool = False


def piecewise_of(root: fx.Node, x: fx.Node, leaves: Mapping[fx.Node, Leaf], in_units: bool) -> Piecewise:
    """Return ``root`` as a function of ``x``; ``leaves`` are the numbers that it reads besides.

    Raises :class:`NotPiecewise` where it is no such function.
    """
    grows, not_so = (1, 0) if in_units else (None, None)  # without a unit there is nothing to grow with
    known: dict[fx.Node, Piecewise] = {x: Piecewise((), ((1.0, 0.0),), grows)}
    for node, leaf in leaves.items():
        known[node] = Piecewise.number(leaf.value, grows if leaf.in_units else not_so)

    def literal(value: Any, node: fx.Node) -> Piecewise | None:
        if isinstance(value, fx.Node):
            return of(value)
        if value is None:
            return None
        if not isinstance(value, (int, float)):
            raise NotPiecewise(f"{value!r}")
        if in_units and value != 0 and node.target not in FACTORS and not isinstance(value, bool):
            raise NotPiecewise("a number beside the unit")
        return Piecewise.number(float(value), not_so if node.target in FACTORS else grows)

    def of(node: fx.Node) -> Piecewise:
        if node not in known:
            rule = OPERATORS.get(node.target)
            factor = {"factor": float(node.kwargs["alpha"])} if "alpha" in node.kwargs else {}
            if rule is None or any(k not in (*IGNORED_KEYWORDS, "alpha") for k in node.kwargs) or _truncates(node):
                raise NotPiecewise(f"{node.target}")
            args = (*node.args, *DEFAULTS.get(node.target, ())[len(node.args) - 1 :])
            known[node] = rule(*(literal(a, node) for a in args), **factor)
        return known[node]

    return of(root)


def _truncates(node: fx.Node) -> bool:
    """Return whether numbers become integers."""
    dtype = node.kwargs.get("dtype", torch.float32)
    return not (dtype.is_floating_point or dtype is torch.bool)
