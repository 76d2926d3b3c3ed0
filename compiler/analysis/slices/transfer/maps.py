"""Where the elements of a movement's result come from, factored by dimension.

The operator itself is run on coordinates: dimension ``d`` of an argument as a tensor that says, for every element, its place along ``d``.
What comes out tells which dimensions of the result depend on which of the argument. These groups are independent, so facts pass through
the operator group by group and stay narrow, however large the value is.
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
class Part:
    """Dimensions ``dims`` of an argument against dimensions ``outs`` of the result: an element at a place of ``outs`` (within the box) is
    the argument's element at place ``index`` of the flattened ``dims``."""

    dims: tuple[int, ...]
    outs: tuple[int, ...]
    left_sizes: tuple[int, ...]
    right_sizes: tuple[int, ...]  # of the whole result
    index: Tensor  # int64, shape: the box along ``outs``
    start: int | None  # where the box begins, if it is smaller than the result
    covers: bool  # every place of ``dims`` is somewhere in ``index``

    def between(self, node: fx.Node, operand: fx.Node) -> Tie:
        left = tuple((operand, d) for d in self.dims)
        right = tuple((node, e) for e in self.outs)
        if self.start is not None:
            return _Segment(node, left, right, self.left_sizes, self.right_sizes, self.index, self.start)
        if len(left) == len(right) == 1 and self.index.numel() == self.left_sizes[0] and _is_range(self.index):
            return equal(node, left[0], right[0], self.left_sizes[0])
        return Tie(node, left, right, self.left_sizes, self.right_sizes, self.index)


@dataclass(frozen=True)
class Argument:
    """What one argument gives: a box of the result. ``exact``: the parts say all, nothing else lies in the box."""

    shape: tuple[int, ...]
    lows: tuple[int, ...]
    highs: tuple[int, ...]
    parts: tuple[Part, ...]
    exact: bool

    def forward(self, fact: Tensor) -> Tensor:
        """A narrow fact of the argument as one of its box."""
        moved = _flatten(fact, [p.dims for p in self.parts], [p.left_sizes for p in self.parts])
        for axis, part in enumerate(self.parts):
            if moved.shape[axis] > 1:
                moved = moved.index_select(axis, part.index.reshape(-1))
        return compress(
            _unflatten(moved, [p.outs for p in self.parts], [p.index.shape for p in self.parts], len(self.lows))
        )

    def backward(self, wanted: Tensor) -> Tensor:
        """Which elements of the argument (narrow) the wanted ones of the result are."""
        for e, (low, high) in enumerate(zip(self.lows, self.highs)):
            if wanted.shape[e] > 1:
                wanted = wanted.narrow(e, low, high - low)
        tied = {e for part in self.parts for e in part.outs}
        for e in range(wanted.dim()):
            if e not in tied and wanted.shape[e] > 1:
                wanted = wanted.any(e, keepdim=True)
        moved = _flatten(wanted, [p.outs for p in self.parts], [p.index.shape for p in self.parts])
        for axis, part in enumerate(self.parts):
            if moved.shape[axis] > 1 or not part.covers:
                spread = [part.index.numel() if a == axis else -1 for a in range(moved.dim())]
                shape = [math.prod(part.left_sizes) if a == axis else size for a, size in enumerate(moved.shape)]
                read = torch.zeros(shape, dtype=torch.int32)
                moved = read.index_add_(axis, part.index.reshape(-1), moved.expand(spread).int()) > 0
        return compress(
            _unflatten(moved, [p.dims for p in self.parts], [p.left_sizes for p in self.parts], len(self.shape))
        )


def _flatten(fact: Tensor, groups: Sequence[tuple[int, ...]], group_sizes: Sequence[Sequence[int]]) -> Tensor:
    """One axis for each group of dimensions, of full size where the fact varies within the group, of size 1 elsewhere."""
    shape, axes = list(fact.shape), []
    for dims, whole in zip(groups, group_sizes):
        if any(fact.shape[d] > 1 for d in dims):
            for d, size in zip(dims, whole):
                shape[d] = size
        axes.append(math.prod(shape[d] for d in dims))
    grouped = [d for dims in groups for d in dims]
    rest = [d for d in range(fact.dim()) if d not in grouped]
    return fact.expand(shape).permute(*grouped, *rest).reshape(axes)


def _unflatten(
    fact: Tensor, groups: Sequence[tuple[int, ...]], group_sizes: Sequence[Sequence[int]], rank: int
) -> Tensor:
    """Back from one axis for each group to ``rank`` dimensions."""
    shape: list[int] = []
    for axis, whole in enumerate(group_sizes):
        shape += whole if fact.shape[axis] == math.prod(whole) else [1] * len(whole)
    grouped = [d for dims in groups for d in dims]
    order = [*grouped, *(d for d in range(rank) if d not in grouped)]
    back = sorted(range(rank), key=order.__getitem__)
    return fact.reshape([*shape, *[1] * (rank - len(shape))]).permute(back)


@dataclass(frozen=True)
class Map:
    """Where all elements of a result of ``shape`` come from, argument by argument."""

    shape: tuple[int, ...]
    arguments: tuple[Argument, ...]

    @property
    def exact(self) -> bool:
        return all(a.exact for a in self.arguments)

    def forward(self, facts: Sequence[Tensor]) -> Tensor:
        """The narrow fact of the result from those of the arguments."""
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
_CACHED = 1000  # maps


def map_of(node: fx.Node, operands: list[fx.Node], indices: dict[fx.Node, Tensor]) -> Map:
    """The map of a call from its moved ``operands``; ``indices`` holds the content of its other tensor arguments. Calls of the same
    operator, shapes and literals share it."""

    def shown(a: Any) -> Any:
        if isinstance(a, fx.Node) and a in indices:
            return indices[a].tolist()
        return f"%{operands.index(a)}" if a in operands else str(concrete(a))

    key = (node.target, tuple(sizes(n) for n in operands), str(fx.node.map_aggregate((node.args, node.kwargs), shown)))
    if key not in _MAPS:
        if len(_MAPS) >= _CACHED:
            _MAPS.clear()
        _MAPS[key] = Map(sizes(node), tuple(_argument(node, n, operands, indices) for n in operands))
    return _MAPS[key]


def _argument(node: fx.Node, operand: fx.Node, operands: list[fx.Node], indices: dict[fx.Node, Tensor]) -> Argument:
    shape = sizes(operand)
    others = {n: torch.full((), -1, dtype=torch.int32).expand(sizes(n)) for n in operands if n is not operand}

    def place(d: int) -> Tensor:
        """For each element of the result, its place along ``d`` of the argument; -1 where it is not of this argument."""
        along = torch.arange(shape[d], dtype=torch.int32) if shape else torch.zeros((), dtype=torch.int32)
        along = along.reshape([-1 if e == d else 1 for e in range(len(shape))]).expand(shape)
        return evaluate(node, {**others, operand: along, **indices})

    varying = [d for d, size in enumerate(shape) if size > 1]
    first = place(varying[0] if varying else 0)
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
    places = {d: (first if d == varying[0] else place(d))[box] for d in varying}
    parts = _parts(shape, tuple(first.shape), lows, [b - a for a, b in zip(lows, highs)], places)
    exact = exact and set(varying) == {d for part in parts for d in part.dims}
    return Argument(shape, tuple(lows), tuple(highs), tuple(parts), exact)


def _parts(
    shape: tuple[int, ...], whole: tuple[int, ...], lows: list[int], box: list[int], places: dict[int, Tensor]
) -> list[Part]:
    found: list[Part] = []
    places = {d: _narrowed(place) for d, place in places.items()}
    for dims, outs in _groups({d: {e for e, size in enumerate(p.shape) if size > 1} for d, p in places.items()}):
        left_sizes = tuple(shape[d] for d in dims)
        index = torch.zeros(tuple(box[e] for e in outs), dtype=torch.long)
        for d in dims:
            index = index * shape[d] + places[d].squeeze([e for e in range(len(whole)) if e not in outs])
        hit = torch.zeros(math.prod(left_sizes), dtype=torch.bool).index_fill_(
            0, index.reshape(-1) % math.prod(left_sizes), True
        )
        part = Part(tuple(dims), tuple(outs), left_sizes, tuple(whole[e] for e in outs), index, None, bool(hit.all()))
        if len(outs) == 1 and whole[outs[0]] != box[outs[0]]:  # a part of a concatenation
            found.append(Part(part.dims, part.outs, left_sizes, part.right_sizes, index, lows[outs[0]], part.covers))
        elif part.right_sizes == tuple(index.shape):
            found.append(part)
    tied = {e for part in found for e in part.outs}
    for e, (low, size) in enumerate(zip(lows, box)):  # a part of one index is tied to nothing, and must stay
        if size < whole[e] and e not in tied:
            nowhere = torch.zeros(size, dtype=torch.long)
            found.append(Part((), (e,), (), (whole[e],), nowhere, low, True))
    return found


def _narrowed(place: Tensor) -> Tensor:
    """``place`` with size 1 along the dimensions in which it does not vary."""
    for e in range(place.dim()):
        first = place.narrow(e, 0, 1)
        if torch.equal(first, place.narrow(e, place.shape[e] - 1, 1)) and bool((place == first).all()):
            place = first
    return place


def _groups(depends: dict[int, set[int]]) -> list[tuple[list[int], list[int]]]:
    """Connected components of "argument dimension d depends on result dimensions E"."""
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
    """A tie in which the result's dimension holds the left side as one of its segments, from ``start`` on. A segment of which nothing is
    kept asks for nothing: the argument is left out."""

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
