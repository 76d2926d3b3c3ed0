"""Index maps of movements: where the elements of a result come from, factored by dimension.

The operator itself is run on coordinates: for dimension ``d`` of an argument, a tensor that holds each element's index along ``d``. The
result tells which of its dimensions depend on which of the argument's. These groups are independent, so facts pass through the operator
group by group and stay narrow, however large the value is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import compress, sizes, slices
from thresher.analysis.slices.ties import Key, Tie, equal
from thresher.analysis.slices.transfer.base import concrete, evaluate


@dataclass(frozen=True)
class DimensionGroup:
    """Dimensions ``dims`` of an argument and the dimensions ``outs`` of the result that they are moved to.

    An element at an index of ``outs`` (within the box) is the argument's element at ``index[...]`` of the flattened ``dims``.
    """

    dims: tuple[int, ...]
    outs: tuple[int, ...]
    left_sizes: tuple[int, ...]
    right_sizes: tuple[int, ...]  # of the whole result
    index: Tensor  # int64, shape: the box along ``outs``
    start: int | None  # where the box begins, if it is smaller than the result
    covers: bool  # every coordinate of ``dims`` is somewhere in ``index``

    def tie(self, node: fx.Node, operand: fx.Node) -> Tie:
        """Return the tie between the dimensions of the argument ``operand`` and of the result ``node``."""
        left = tuple((operand, d) for d in self.dims)
        right = tuple((node, e) for e in self.outs)
        if self.start is not None:
            return _Segment(node, left, right, self.left_sizes, self.right_sizes, self.index, self.start)
        if len(left) == len(right) == 1 and self.index.numel() == self.left_sizes[0] and _is_range(self.index):
            return equal(node, left[0], right[0], self.left_sizes[0])
        return Tie(node, left, right, self.left_sizes, self.right_sizes, self.index)


@dataclass(frozen=True)
class Argument:
    """One argument's contribution: the box of the result that its elements fill.

    ``groups`` say which of its elements are where in the box; ``exact``: they say it completely, and nothing else lies in the box.
    """

    shape: tuple[int, ...]
    lows: tuple[int, ...]
    highs: tuple[int, ...]
    groups: tuple[DimensionGroup, ...]
    exact: bool

    def forward(self, fact: Tensor) -> Tensor:
        """Return a narrow fact of the argument as one of its box."""
        moved = _flatten(fact, [g.dims for g in self.groups], [g.left_sizes for g in self.groups])
        for axis, group in enumerate(self.groups):
            if moved.shape[axis] > 1:
                moved = moved.index_select(axis, group.index.reshape(-1))
        return compress(
            _unflatten(moved, [g.outs for g in self.groups], [g.index.shape for g in self.groups], len(self.lows))
        )

    def backward(self, wanted: Tensor) -> Tensor:
        """Return which elements of the argument (narrow) the wanted ones of the result are."""
        for e, (low, high) in enumerate(zip(self.lows, self.highs)):
            if wanted.shape[e] > 1:
                wanted = wanted.narrow(e, low, high - low)
        tied = {e for group in self.groups for e in group.outs}
        for e in range(wanted.dim()):
            if e not in tied and wanted.shape[e] > 1:
                wanted = wanted.any(e, keepdim=True)
        moved = _flatten(wanted, [g.outs for g in self.groups], [g.index.shape for g in self.groups])
        for axis, group in enumerate(self.groups):
            if moved.shape[axis] > 1 or not group.covers:
                spread = [group.index.numel() if a == axis else -1 for a in range(moved.dim())]
                shape = [math.prod(group.left_sizes) if a == axis else size for a, size in enumerate(moved.shape)]
                read = torch.zeros(shape, dtype=torch.int32)
                moved = read.index_add_(axis, group.index.reshape(-1), moved.expand(spread).int()) > 0
        return compress(
            _unflatten(moved, [g.dims for g in self.groups], [g.left_sizes for g in self.groups], len(self.shape))
        )


def _flatten(fact: Tensor, groups: Sequence[tuple[int, ...]], group_sizes: Sequence[Sequence[int]]) -> Tensor:
    """Return one axis for each group of dimensions, of full size where the fact varies within the group, of size 1 elsewhere."""
    shape, axes = list(fact.shape), []
    for dims, whole in zip(groups, group_sizes):
        if any(fact.shape[d] > 1 for d in dims):
            for d, size in zip(dims, whole):
                shape[d] = size
        axes.append(math.prod(shape[d] for d in dims))
    grouped = [d for dims in groups for d in dims]
    rest = [d for d in range(fact.dim()) if d not in grouped]
    return fact.expand(shape).permute([*grouped, *rest]).reshape(axes)


def _unflatten(
    fact: Tensor, groups: Sequence[tuple[int, ...]], group_sizes: Sequence[Sequence[int]], rank: int
) -> Tensor:
    """Return one axis for each group as ``rank`` dimensions."""
    shape: list[int] = []
    for axis, whole in enumerate(group_sizes):
        shape += whole if fact.shape[axis] == math.prod(whole) else [1] * len(whole)
    grouped = [d for dims in groups for d in dims]
    order = [*grouped, *(d for d in range(rank) if d not in grouped)]
    back = sorted(range(rank), key=order.__getitem__)
    return fact.reshape([*shape, *[1] * (rank - len(shape))]).permute(back)


@dataclass(frozen=True)
class Map:
    """The origin of all elements of a result of ``shape``, argument by argument."""

    shape: tuple[int, ...]
    arguments: tuple[Argument, ...]

    @property
    def exact(self) -> bool:
        """True if the groups of every argument say completely where its elements are."""
        return all(a.exact for a in self.arguments)

    def forward(self, facts: Sequence[Tensor]) -> Tensor:
        """Return the narrow fact of the result from those of the arguments."""
        pieces = [a.forward(fact) for a, fact in zip(self.arguments, facts)]
        if len(pieces) == 1:
            return pieces[0]
        joined = {e for a in self.arguments for e, size in enumerate(self.shape) if a.highs[e] - a.lows[e] < size}
        shape = [s if e in joined else max(p.shape[e] for p in pieces) for e, s in enumerate(self.shape)]
        result = torch.zeros(shape, dtype=pieces[0].dtype)
        for a, piece in zip(self.arguments, pieces):
            result[tuple(slice(a.lows[e], a.highs[e]) if e in joined else slice(None) for e in range(len(shape)))] = (
                piece
            )
        return compress(result)


_MAPS: dict[Any, Map] = {}
_MAX_CACHED = 1000


def map_of(node: fx.Node, operands: list[fx.Node], indices: dict[fx.Node, Tensor]) -> Map:
    """Return the map of a call from its moved ``operands``; ``indices`` holds the content of its other tensor arguments.

    Calls of the same operator, shapes and literals share it.
    """

    def shown(a: Any) -> Any:
        if isinstance(a, fx.Node) and a in indices:
            return indices[a].tolist()
        return f"%{operands.index(a)}" if a in operands else str(concrete(a))

    key = (node.target, tuple(sizes(n) for n in operands), str(fx.node.map_aggregate((node.args, node.kwargs), shown)))
    if key not in _MAPS:
        if len(_MAPS) >= _MAX_CACHED:
            _MAPS.clear()
        _MAPS[key] = Map(sizes(node), tuple(_argument(node, n, operands, indices) for n in operands))
    return _MAPS[key]


def _argument(node: fx.Node, operand: fx.Node, operands: list[fx.Node], indices: dict[fx.Node, Tensor]) -> Argument:
    shape = sizes(operand)
    others = {n: torch.full((), -1, dtype=torch.int32).expand(sizes(n)) for n in operands if n is not operand}

    def coordinate(d: int) -> Tensor:
        """For each element of the result, its coordinate along ``d`` of the argument; -1 where it is not of this argument."""
        along = torch.arange(shape[d], dtype=torch.int32) if shape else torch.zeros((), dtype=torch.int32)
        along = along.reshape([-1 if e == d else 1 for e in range(len(shape))]).expand(shape)
        return evaluate(node, {**others, operand: along, **indices})

    varying = [d for d, size in enumerate(shape) if size > 1]
    first = coordinate(varying[0] if varying else 0)
    lows, highs, exact = [0] * first.dim(), list(first.shape), True
    if others:
        inside = first >= 0
        if not bool(inside.any()):
            return Argument(shape, tuple(lows), tuple(lows), (), False)
        for e in range(first.dim()):
            present = slices(inside, e, first.shape[e], every=False).nonzero().reshape(-1)
            lows[e], highs[e] = int(present[0]), int(present[-1]) + 1
        exact = bool(inside[tuple(slice(a, b) for a, b in zip(lows, highs))].all())
    box = tuple(slice(a, b) for a, b in zip(lows, highs))
    coordinates = {d: (first if d == varying[0] else coordinate(d))[box] for d in varying}
    groups = _dimension_groups(shape, tuple(first.shape), lows, [b - a for a, b in zip(lows, highs)], coordinates)
    exact = exact and set(varying) == {d for group in groups for d in group.dims}
    return Argument(shape, tuple(lows), tuple(highs), tuple(groups), exact)


def _dimension_groups(
    shape: tuple[int, ...], whole: tuple[int, ...], lows: list[int], box: list[int], coordinates: dict[int, Tensor]
) -> list[DimensionGroup]:
    result: list[DimensionGroup] = []
    coordinates = {d: _narrowed(coordinate) for d, coordinate in coordinates.items()}
    for dims, outs in _groups({d: {e for e, size in enumerate(p.shape) if size > 1} for d, p in coordinates.items()}):
        left_sizes = tuple(shape[d] for d in dims)
        index = torch.zeros(tuple(box[e] for e in outs), dtype=torch.long)
        for d in dims:
            index = index * shape[d] + coordinates[d].squeeze([e for e in range(len(whole)) if e not in outs])
        hit = torch.zeros(math.prod(left_sizes), dtype=torch.bool).index_fill_(
            0, index.reshape(-1) % math.prod(left_sizes), True
        )
        group = DimensionGroup(
            tuple(dims), tuple(outs), left_sizes, tuple(whole[e] for e in outs), index, None, bool(hit.all())
        )
        if len(outs) == 1 and whole[outs[0]] != box[outs[0]]:  # a part of a concatenation
            result.append(
                DimensionGroup(
                    group.dims, group.outs, left_sizes, group.right_sizes, index, lows[outs[0]], group.covers
                )
            )
        elif group.right_sizes == tuple(index.shape):
            result.append(group)
    tied = {e for group in result for e in group.outs}
    for e, (low, size) in enumerate(zip(lows, box)):  # a part of one index is tied to nothing, and must stay
        if size < whole[e] and e not in tied:
            no_source = torch.zeros(size, dtype=torch.long)
            result.append(DimensionGroup((), (e,), (), (whole[e],), no_source, low, True))
    return result


def _narrowed(coordinate: Tensor) -> Tensor:
    """Return ``coordinate`` with size 1 along the dimensions in which it does not vary."""
    for e in range(coordinate.dim()):
        first = coordinate.narrow(e, 0, 1)
        if torch.equal(first, coordinate.narrow(e, coordinate.shape[e] - 1, 1)) and bool((coordinate == first).all()):
            coordinate = first
    return coordinate


def _groups(depends: dict[int, set[int]]) -> list[tuple[list[int], list[int]]]:
    """Return the connected components of "argument dimension d depends on result dimensions E"."""
    groups: list[tuple[set[int], set[int]]] = []
    for d, outs in depends.items():
        dims, joined = {d}, set(outs)
        rest = []
        for other_dims, other_outs in groups:
            if other_outs & joined:
                dims |= other_dims
                joined |= other_outs
            else:
                rest.append((other_dims, other_outs))
        groups = [*rest, (dims, joined)]
    return [(sorted(a), sorted(b)) for a, b in groups]


def _is_range(index: Tensor) -> bool:
    return bool((index == torch.arange(index.numel())).all())


class _Segment(Tie):
    """A tie in which the result's dimension holds the left side as one of its segments, from ``start`` on.

    A segment of which nothing is kept asks for nothing: the argument is left out.
    """

    def __init__(self, node, left, right, left_sizes, right_sizes, index, start):
        super().__init__(node, left, right, left_sizes, right_sizes, index)
        self.start = start

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        key, stop = self.right[0], self.start + self.index.shape[0]
        if not bool(keep[key][self.start : stop].any()):
            return []
        inner = Tie(self.node, self.left, self.right, self.left_sizes, (stop - self.start,), self.index)
        part = {**{k: keep[k] for k in self.left}, key: keep[key][self.start : stop]}
        grown = inner.close(part)
        for changed in grown:
            if changed == key:
                whole = keep[key].clone()
                whole[self.start : stop] = part[key]
                keep[key] = whole
            else:
                keep[changed] = part[changed]
        return grown
