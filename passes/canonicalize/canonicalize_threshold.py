"""Every spelling of thresholding becomes one ``thresher::shrink(x, t, kind)``.

relu(x - t) - relu(-x - t), sign(x) relu(|x| - t), x - clamp(x, -t, t), where(|x| > t, x, 0), x * (|x| > t), ... are recognised by what they
compute, not by how they look: what stands between a value and a result is a piecewise linear function (``thresher.analysis.piecewise``),
and that of a threshold is known,

    soft      1 outside [-t, t], shifted by t, and 0 inside         positive  0 below t, x - t above
    hard      x outside [-t, t] and 0 inside                        above     0 below t, x above
    firm      0 inside [-t, t], x outside [-t2, t2], a line between

What happens at t, for NaN and for infinities is seen by computing it, and must be what the operator does. So ``relu`` before or after a
threshold, or one threshold after another, become one, too. Thresholds that divide (x relu(1 - t / |x|), pairs z relu(1 - t / |z|),
garrote) are found by their patterns.

``t`` is a number, a constant, or computed in the graph; for ``soft`` and ``firm`` it must be seen not to be negative: from its value, or
from what made it. Refused, each with its reason: a soft threshold that may be negative; a function that is 0 in the middle but not
symmetric, or scaled; one that differs from the operator at its breakpoints, for NaN or for infinities. (Soft and hard: Donoho & Johnstone,
1994; firm: Gao & Bruce, 1997; garrote: Gao, 1998.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import thresher.ops.shrink  # noqa: F401  (registers the operator)
from thresher.analysis.piecewise import KINKS, OPERATORS, Leaf, NotPiecewise, Piecewise, piecewise_of
from thresher.analysis.signs import nonnegative
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program
from thresher.ops.shrink import KEEPS
from thresher.passes.canonicalize._dividing_thresholds import rewrite_dividing
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
SHRINK = torch.ops.thresher.shrink.default
MAX_CALLS = 24  # of a spelling
TOLERANCE = 1e-12  # relative, between numbers that should be equal


@dataclass(frozen=True)
class Threshold:
    """shrink(x, t, kind, keep, t2) with t and t2 as multiples of ``unit``, or as they are without one."""

    x: fx.Node
    unit: fx.Node | None
    kind: str
    t: float
    t2: float | None = None
    keep: str = "nle"


@register_pass
@dataclass(frozen=True)
class CanonicalizeThreshold(Pass):
    """Write every threshold as thresher::shrink."""

    name: ClassVar[str] = "canonicalize-threshold"
    requires: ClassVar[tuple[str, ...]] = ("simplify",)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes, refusals = program.clone(), [], []
        for node in reversed(list(work.calls())):
            if not node.users:  # part of what has been replaced
                work.graph.erase_node(node)
                continue
            if node.target not in OPERATORS or not is_tensor(node) or not dtype_of(node).is_floating_point:
                continue
            threshold = threshold_at(work, node)
            if isinstance(threshold, str):
                refusals += [Note.at(node, threshold)] if threshold else []
            elif threshold is not None:
                notes.append(Note.at(node, f"written as thresher::shrink ({threshold.kind})"))
                rewrite(work, node, threshold)
                work.graph.erase_node(node)
        notes += rewrite_dividing(work)
        return PassResult(work.clean(), notes, refusals) if notes else PassResult(program, [], refusals)


def threshold_at(program: Program, root: fx.Node) -> Threshold | str | None:
    """Return the threshold that ends in ``root``; or why it is none though it looks like one (or empty); or None."""
    reason = None
    for x in sources(program, root):
        try:
            leaves, unit = leaves_between(program, root, x)
            function = piecewise_of(root, x, leaves, unit is not None)
        except NotPiecewise:
            continue
        threshold = kind_of(function, x, unit)
        if threshold is None:
            reason = reason or _near_miss(function)
            continue
        if threshold.kind in ("soft", "firm") and unit is not None and not nonnegative(program, unit):
            reason = "a soft threshold that may be negative has no single meaning"
            continue
        keep = what_is_kept(program, root, threshold, leaves)
        if keep is None:
            reason = "it is no threshold at its breakpoints, or for NaN and infinities"
            continue
        return Threshold(threshold.x, threshold.unit, threshold.kind, threshold.t, threshold.t2, keep)
    return reason


def sources(program: Program, root: fx.Node) -> list[fx.Node]:
    """Return the values of the shape and type of ``root`` that it may be a function of, those farthest back first."""
    seen: dict[fx.Node, None] = {}
    queue = [root]
    while queue and len(seen) < MAX_CALLS:
        node = queue.pop(0)
        if node in seen or program.constant(node) is not None:
            continue
        seen[node] = None
        if node.target in OPERATORS:
            queue += [n for n in node.all_input_nodes if is_tensor(n)]
    if not any(n.target in KINKS for n in seen):
        return []
    alike = [n for n in seen if n is not root and shape_of(n) == shape_of(root) and dtype_of(n) == dtype_of(root)]
    return sorted(alike)


def leaves_between(program: Program, root: fx.Node, x: fx.Node) -> tuple[dict[fx.Node, Leaf], fx.Node | None]:
    """Return the values that ``root`` depends on beside ``x`` and numbers: zeros, multiples of at most one tensor, the unit; and the unit.

    A constant stays the one it is, also if all of it is one number: it may be trained. Raises :class:`NotPiecewise`.
    """
    leaves: dict[fx.Node, Leaf] = {}
    between = _depending_on(root, x)
    if x not in between:
        raise NotPiecewise("it does not depend on x")
    queue, seen, unit = [root], {x}, None
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        value = program.constant(node)
        if value is not None and not bool(value.any()):
            leaves[node] = Leaf(0.0)
        elif node in between or (value is None and _multiple(node)):
            queue += node.all_input_nodes
        else:
            unit = unit or node
            leaves[node] = Leaf(_ratio(program, node, unit), in_units=True)
    positive = next(
        (n for n, leaf in leaves.items() if leaf.in_units and leaf.value == -1 and nonnegative(program, n)), None
    )
    if unit is not None and positive is not None:  # -t came first
        unit, leaves = (
            positive,
            {n: replace(leaf, value=-leaf.value) if leaf.in_units else leaf for n, leaf in leaves.items()},
        )
    if unit is not None and torch.broadcast_shapes(shape_of(unit), shape_of(x)) != torch.Size(shape_of(x)):
        raise NotPiecewise("the threshold is larger than the value")
    if unit is not None and program.constant(unit) is None and _elements(unit) == _elements(x):
        raise NotPiecewise("another value of the same size")
    return leaves, unit


def _ratio(program: Program, node: fx.Node, unit: fx.Node) -> float:
    """Return the ratio in node = ratio * unit; raises :class:`NotPiecewise` where there is none."""
    a, b = program.constant(node), program.constant(unit)
    if node is unit:
        return 1.0
    if a is not None and b is not None and torch.equal(a, -b):
        return -1.0
    raise NotPiecewise("two tensors beside x")


def _elements(node: fx.Node) -> Any:
    return node.meta["val"].numel()


def _multiple(node: fx.Node) -> bool:
    """Return whether it is -t, or t times a number."""
    return node.target is aten.neg.default or (
        node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(node.args[1], (int, float))
    )


def _depending_on(root: fx.Node, x: fx.Node) -> set[fx.Node]:
    """Return the calls from ``x`` to ``root``, both included."""
    known: dict[fx.Node, bool] = {x: True}

    def depends(node: fx.Node) -> bool:
        if node not in known:
            known[node] = False
            if node > x and node.target in OPERATORS:
                known[node] = any([depends(n) for n in node.all_input_nodes])
        return known[node]

    depends(root)
    return {n for n, yes in known.items() if yes}


# ---------------------------------------------------------------------- which threshold it is


def kind_of(f: Piecewise, x: fx.Node, unit: fx.Node | None) -> Threshold | None:
    """Return the threshold that has these pieces, or None."""
    breaks, pieces = f.breaks, f.pieces

    def like(*wanted: tuple[float, float]) -> bool:
        return len(wanted) == len(pieces) and all(_close(a, b) for w, p in zip(wanted, pieces) for a, b in zip(w, p))

    if len(breaks) == 1:
        (t,) = breaks
        if t > 0 or (t < 0 and unit is None and like((0, 0), (1, 0))):
            for kind, offset in (("positive", -t), ("above", 0.0)):
                if like((0, 0), (1, offset)):
                    return Threshold(x, unit, kind, t)
        return None
    if not breaks:
        return None
    t = breaks[len(breaks) // 2]
    if len(breaks) == 2 and t > 0 and _close(breaks[0], -t):
        for kind, offset in (("soft", t), ("hard", 0.0)):
            if like((1, offset), (0, 0), (1, -offset)):
                return Threshold(x, unit, kind, t)
    if len(breaks) == 4 and t > 0 and _close(breaks[1], -t) and _close(breaks[0], -breaks[3]):
        t2 = breaks[3]
        slope = t2 / (t2 - t)
        if like((1, 0), (slope, slope * t), (0, 0), (slope, -slope * t), (1, 0)):
            return Threshold(x, unit, "firm", t, t2)
    return None


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= TOLERANCE * max(1.0, abs(a), abs(b))


def _near_miss(f: Piecewise) -> str | None:
    """Return a refusal for something that is 0 in the middle and grows on both sides, and is no threshold."""
    if len(f.breaks) >= 2 and any(p == (0, 0) for p in f.pieces[1:-1]) and f.pieces[0][0] and f.pieces[-1][0]:
        return f"0 between {f.breaks[0]:g} and {f.breaks[-1]:g}, and no threshold: not symmetric, or scaled"
    return None


# ---------------------------------------------------------------------- what happens at t, and for NaN and infinities


def what_is_kept(program: Program, root: fx.Node, threshold: Threshold, leaves: dict[fx.Node, Leaf]) -> str | None:
    """Return the ``keep`` with which the operator agrees with the graph at t and around it, at 0, for NaN and infinities; or None."""
    unit, x = _samples(program, threshold)
    values: dict[fx.Node, Tensor] = {threshold.x: x}
    for node, leaf in leaves.items():
        values[node] = unit * leaf.value if leaf.in_units else torch.tensor(leaf.value, dtype=dtype_of(node))
    expected = _computed(root, values)
    keeps = KEEPS if threshold.kind in ("hard", "above") else ("nle",)
    return next((k for k in keeps if _agree(expected, _shrunk(threshold, x, unit, k))), None)


def _samples(program: Program, threshold: Threshold) -> tuple[Tensor, Tensor]:
    """Return values of the unit, and of x around the breakpoints, along a new first dimension."""
    dtype = dtype_of(threshold.x)
    unit = torch.ones(())
    if threshold.unit is not None:
        constant = program.constant(threshold.unit)
        shape = [d if isinstance(d, int) else 3 for d in shape_of(threshold.unit)]  # some number, where it is dynamic
        numbers = torch.tensor([0.0, 0.3, 1.0, 2.5, *([] if nonnegative(program, threshold.unit) else [-0.7])])
        pattern = numbers[torch.arange(math.prod(shape)) % len(numbers)].reshape(shape)
        unit = (pattern if constant is None else constant).reshape(
            *[1] * (len(shape_of(threshold.x)) - len(shape)), *shape
        )
    edges = [(unit.double() * v).to(dtype) for v in (threshold.t, threshold.t2) if v is not None]
    fixed = (0.0, -0.0, 1.0, torch.inf, -torch.inf, torch.nan)
    around = [torch.full_like(edges[0], value) for value in fixed]
    step = torch.finfo(dtype).eps
    for edge in edges:
        for factor in (1.0, 0.5, 1.5, 3.0, 1 + 2 * step, 1 - 2 * step):
            around += [edge * factor, -edge * factor]
    return unit.to(dtype), torch.stack(around)


def _computed(root: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    def of(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value not in values:
            values[value] = value.target(*map(of, value.args), **value.kwargs)
        return values[value]

    return of(root)


def _shrunk(threshold: Threshold, x: Tensor, unit: Tensor, keep: str) -> Tensor:
    t, t2 = ((unit.double() * v).to(x.dtype) if v is not None else None for v in (threshold.t, threshold.t2))
    return SHRINK(x, t, threshold.kind, keep, t2)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return whether both are equal up to roundings: what is kept or not at t differs by t."""
    a, b = torch.broadcast_tensors(a, b)
    tolerance = 4 * torch.finfo(a.dtype).eps
    largest = float(a.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


# ---------------------------------------------------------------------- the rewrite


def rewrite(program: Program, root: fx.Node, threshold: Threshold) -> None:
    """Write ``root`` as one operator."""

    def scaled(value: float, name: str) -> fx.Node:
        if threshold.unit is None:
            number = torch.tensor(value, dtype=torch.float64)
            return program.add_constant(number, f"{root.name}_{name}", dtype_of(root), like=root)
        if value == 1:
            return threshold.unit
        return program.insert_call(root, aten.mul.Tensor, (threshold.unit, value), like=root)

    extra = () if threshold.t2 is None else (scaled(threshold.t2, "t2"),)
    args = (threshold.x, scaled(threshold.t, "t"), threshold.kind, threshold.keep, *extra)
    root.replace_all_uses_with(program.insert_call(root, SHRINK, args, like=root))
