"""Operators that only move elements: their rows are found by running them on element numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.facts import Known, compress, known, sizes, slices
from thresher.analysis.rows.base import (
    Facts,
    Row,
    argument,
    aten,
    concrete,
    evaluate,
    is_constant,
    mask_of,
    nothing,
    tensors,
)
from thresher.analysis.ties import Key, Tie, equal


class Movement(Row):
    """Operators that only move elements: every element of the result is one element of one argument.

    All questions are answered by running the operator itself: on the facts (forward), and on a tensor of element numbers
    (backward, ties). So a row needs only say how its literals change.
    """

    supported = True

    def __init__(self, fix: Callable[[fx.Node, Any], None] | None = None):
        self.fix = fix

    def moved(self, node: fx.Node, facts: Facts) -> list[fx.Node]:
        """The arguments whose elements are moved (an index is none)."""
        return tensors(node)

    def indices(self, node: fx.Node, facts: Facts) -> dict[fx.Node, Tensor] | None:
        """The content of the other tensor arguments; None where one of them is not constant."""
        return {}

    def map(self, node: fx.Node, facts: Facts) -> _Map | None:
        """Where the elements come from; calls of the same shape and literals share it."""
        indices = self.indices(node, facts)
        return None if indices is None else _map_of(node, self.moved(node, facts), indices)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operands, indices = self.moved(node, facts), self.indices(node, facts)
        if indices is None or not any(n in facts for n in operands):
            return None
        found = self.map(node, facts)
        if found is not None and len(operands) == 1:
            fact = facts[operands[0]]
            mask, content = (found.forward(t, len(sizes(node))) for t in (fact.mask, fact.content))
            if mask is not None and content is not None:
                return known(mask, content.double() if content.is_floating_point() else content)
        masks = {n: mask_of(n, facts).expand(sizes(n)) for n in operands}
        mask = evaluate(node, masks | indices)
        if not any(n in facts and bool(facts[n].content.any()) for n in operands):
            return known(mask, nothing(node))
        values = {n: (facts[n].value if n in facts else nothing(n)).expand(sizes(n)) for n in operands}
        return known(mask, evaluate(node, values | indices))

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands, found = self.moved(node, facts), self.map(node, facts)
        if found is None:
            return super().read(node, wanted, facts)
        result = {n: torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in tensors(node)}  # an index is no value
        if found.onto and bool(wanted.all()):
            return result | {n: torch.ones([1] * len(sizes(n)), dtype=torch.bool) for n in operands}
        back = [found.backward(wanted, number, len(sizes(n))) for number, n in enumerate(operands)]
        if all(part is not None for part in back):
            return result | dict(zip(operands, back))
        flat = torch.zeros(found.total, dtype=torch.bool)
        flat[found.source[wanted.expand(found.source.shape)]] = True
        parts = flat.split([math.prod(sizes(n)) for n in operands])
        return result | {n: compress(part.reshape(sizes(n))) for n, part in zip(operands, parts)}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = self.map(node, facts)
        if found is None:
            return []
        operands = self.moved(node, facts)
        return [part.between(node, operands[part.operand]) for part in found.parts]

    def shrink(self, node: fx.Node, plan: Any) -> None:
        if self.fix is not None:
            self.fix(node, plan)


# ---------------------------------------------------------------------- where elements come from


@dataclass(frozen=True)
class _Part:
    """A tie of a movement, without its nodes: dimensions ``dims`` of one argument against ``outs`` of the result."""

    operand: int
    dims: tuple[int, ...]
    outs: tuple[int, ...]
    left_sizes: tuple[int, ...]
    right_sizes: tuple[int, ...]
    index: Tensor
    start: int | None  # where the argument starts within the result's dimension, if that is larger

    def between(self, node: fx.Node, operand: fx.Node) -> Tie:
        left = tuple((operand, d) for d in self.dims)
        right = tuple((node, e) for e in self.outs)
        if self.start is not None:
            return _Segment(node, left, right, self.left_sizes, self.right_sizes, self.index, self.start)
        if len(left) == len(right) == 1 and self.index.numel() == self.left_sizes[0] and _is_range(self.index):
            return equal(node, left[0], right[0], self.left_sizes[0])
        return Tie(node, left, right, self.left_sizes, self.right_sizes, self.index)


@dataclass(frozen=True)
class _Map:
    """``source``: for each element of the result the number of the argument's element it is; arguments are numbered one after the
    other. ``onto``: every element of every argument is there."""

    source: Tensor
    total: int
    onto: bool
    parts: tuple[_Part, ...]

    def forward(self, fact: Tensor, rank: int) -> Tensor | None:
        """The narrow fact of the result from that of the only argument, if it varies within one part; else None."""
        varying = {d for d, size in enumerate(fact.shape) if size > 1}
        part = self._holding(varying, lambda p: p.dims)
        if part is None:
            return fact.reshape([1] * rank) if not varying else None
        flat = fact.reshape([fact.shape[d] for d in part.dims]).expand(part.left_sizes).reshape(-1)
        return compress(_in_place(flat[part.index], part.outs, rank))

    def backward(self, wanted: Tensor, operand: int, rank: int) -> Tensor | None:
        """Which elements of one argument the wanted ones of the result are, if these vary within one part of it; else None."""
        varying = {d for d, size in enumerate(wanted.shape) if size > 1}
        parts = [part for part in self.parts if part.operand == operand]
        holding = [part for part in parts if varying & set(part.outs)]
        if varying and not (len(holding) == 1 and varying <= set(holding[0].outs)):
            return None
        result = torch.ones([1] * rank, dtype=torch.bool) if varying else wanted.reshape([1] * rank)
        for part in parts:
            here = torch.ones(part.index.shape, dtype=torch.bool)
            if holding and part is holding[0]:
                here = wanted.reshape([wanted.shape[d] for d in part.outs]).expand(part.right_sizes)
                here = here if part.start is None else here[part.start : part.start + part.index.shape[0]]
            read = torch.zeros(math.prod(part.left_sizes), dtype=torch.bool)
            read[part.index[here]] = True
            result = result & compress(_in_place(read.reshape(part.left_sizes), part.dims, rank))
        return result

    def _holding(self, varying: set[int], ends: Callable[[_Part], tuple[int, ...]]) -> _Part | None:
        """The one part within which all ``varying`` dimensions lie."""
        found = [part for part in self.parts if varying & set(ends(part))]
        one = len(found) == 1 and varying <= set(ends(found[0])) and found[0].start is None
        return found[0] if one else None


def _in_place(values: Tensor, dims: tuple[int, ...], rank: int) -> Tensor:
    """``values`` along ``dims`` of a narrow fact of ``rank`` dimensions."""
    shape = [1] * rank
    for d, size in zip(dims, values.shape):
        shape[d] = size
    return values.reshape(shape)


_MAPS: dict[Any, _Map] = {}
_CACHED = 1 << 20  # maps of larger values are made anew


def _is_range(index: Tensor) -> bool:
    return bool((index == torch.arange(index.numel())).all())


def _map_of(node: fx.Node, operands: list[fx.Node], indices: dict[fx.Node, Tensor]) -> _Map:
    def shown(a: Any) -> Any:
        if isinstance(a, fx.Node) and a in indices:
            return indices[a].tolist()
        return f"%{operands.index(a)}" if a in operands else str(concrete(a))

    shapes = tuple(sizes(n) for n in operands)
    key = (node.target, shapes, str(fx.node.map_aggregate((node.args, node.kwargs), shown)))
    if key in _MAPS:
        return _MAPS[key]
    values, start = {}, 0
    for operand, shape in zip(operands, shapes):
        values[operand] = torch.arange(start, start + math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    source = evaluate(node, values | indices)
    parts: list[_Part] = []
    first = 0
    for number, shape in enumerate(shapes):
        count = math.prod(shape)
        inside = None if len(shapes) == 1 else (source >= first) & (source < first + count)
        parts += _parts_of(number, shape, source - first, inside)
        first += count
    onto = source.numel() >= start and bool(
        torch.zeros(start, dtype=torch.bool).index_fill_(0, source.reshape(-1), True).all()
    )
    found = _Map(source, start, onto, tuple(parts))
    if source.numel() <= _CACHED:
        if len(_MAPS) > 1000:
            _MAPS.clear()
        _MAPS[key] = found
    return found


def _parts_of(operand: int, shape: tuple[int, ...], source: Tensor, inside: Tensor | None) -> list[_Part]:
    """Ties between the dimensions of one argument and those of the result, from the element numbers in ``source``; ``inside`` says
    which of them are of this argument."""
    if inside is None:
        lows, highs = [0] * source.dim(), list(source.shape)
    elif not bool(inside.any()):
        return []
    else:
        lows, highs = [], []
        for dim in range(source.dim()):
            present = slices(inside, dim, source.shape[dim], every=False).nonzero().reshape(-1)
            lows.append(int(present[0]))
            highs.append(int(present[-1]) + 1)
    box = source[tuple(slice(a, b) for a, b in zip(lows, highs))]
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    places = {d: (box // strides[d]) % shape[d] for d in range(len(shape)) if shape[d] > 1}
    depends = {
        d: {e for e in range(box.dim()) if box.shape[e] > 1 and bool((p != p.narrow(e, 0, 1)).any())}
        for d, p in places.items()
    }
    found: list[_Part] = []
    for dims, outs in _groups(depends):
        corner = tuple(slice(None) if e in outs else 0 for e in range(box.dim()))
        left_sizes = tuple(shape[d] for d in dims)
        index = torch.zeros(tuple(box.shape[e] for e in outs), dtype=torch.long)
        for d in dims:
            index = index * shape[d] + places[d][corner]
        out_sizes = tuple(source.shape[e] for e in outs)
        if len(outs) == 1 and out_sizes[0] != box.shape[outs[0]]:  # a part of a concatenation
            found.append(_Part(operand, tuple(dims), (outs[0],), left_sizes, out_sizes, index, lows[outs[0]]))
        elif out_sizes == tuple(index.shape):
            found.append(_Part(operand, tuple(dims), tuple(outs), left_sizes, out_sizes, index, None))
    tied = {e for part in found for e in part.outs}
    for e, (low, size) in enumerate(zip(lows, box.shape)):  # a part of one index is tied to nothing, and must stay
        if size < source.shape[e] and e not in tied:
            nowhere = torch.zeros(size, dtype=torch.long)
            found.append(_Part(operand, (), (e,), (), (source.shape[e],), nowhere, low))
    return found


class _Segment(Tie):
    """A tie in which the result's dimension holds the left side as one of its segments, from ``start`` on."""

    def __init__(self, node, left, right, left_sizes, right_sizes, index, start):
        super().__init__(node, left, right, left_sizes, right_sizes, index)
        self.start = start

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        key, stop = self.right[0], self.start + self.index.shape[0]
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


def fix_sizes(position: int) -> Callable[[fx.Node, Any], None]:
    """view, reshape, expand: the size literals of cut dimensions."""

    def fix(node: fx.Node, plan: Any) -> None:
        old = list(node.args[position])
        new = [
            s if isinstance(s, fx.Node) or s == -1 or plan.full(node, d) else plan.count(node, d)
            for d, s in enumerate(old)
        ]
        node.update_arg(position, new)

    return fix


def fix_slice(node: fx.Node, plan: Any) -> None:
    """slice: its bounds among the kept indices."""
    operand = node.args[0]
    dim = argument(node, 1, "dim", 0) % len(sizes(node))
    if plan.full(operand, dim):
        return
    size = sizes(operand)[dim]
    start, stop, _ = slice(*(concrete(argument(node, i, k)) for i, k in ((2, "start"), (3, "end")))).indices(size)
    keep = plan.keep[(operand, dim)]
    first = int(keep[:start].sum())
    node.args = (operand, dim, first, first + int(keep[start:stop].sum()))
    node.kwargs = {}


def fix_squeeze(node: fx.Node, plan: Any) -> None:
    """squeeze: only what had one index before; a dimension that was cut down to one index stays."""
    before = sizes(node.args[0])
    dims = argument(node, 1, "dim", range(len(before)))
    dims = [dims] if isinstance(dims, int) else dims
    node.target, node.kwargs = aten.squeeze.dims, {}
    node.args = (node.args[0], [d % len(before) for d in dims if before[d] == 1])


def fix_select(node: fx.Node, plan: Any) -> None:
    """select: its index among the kept ones."""
    operand, dim, index = node.args
    dim = dim % len(sizes(operand))
    if not plan.full(operand, dim):
        index = index % sizes(operand)[dim]
        node.args = (operand, dim, int(plan.keep[(operand, dim)][:index].sum()))


class Slice(Movement):
    """slice with a step other than 1 is not cut along its dimension."""

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = super().ties(node, facts)
        if argument(node, 4, "step", 1) == 1:
            return found
        dim = argument(node, 1, "dim", 0) % len(sizes(node))
        return [t for t in found if (node, dim) not in t.keys]


class Roll(Movement):
    """roll along dimensions: by as many places as kept indices come around the end. Of the flattened value: nothing is cut."""

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        return super().ties(node, facts) if argument(node, 2, "dims", []) else []

    def shrink(self, node: fx.Node, plan: Any) -> None:
        operand, shifts, dims = node.args[0], node.args[1], argument(node, 2, "dims", [])
        keeps = [plan.keep[(operand, dim % len(sizes(operand)))] for dim in dims]
        places = [int(keep[len(keep) - shift % len(keep) :].sum()) for keep, shift in zip(keeps, shifts)]
        node.args, node.kwargs = (operand, places, dims), {}


class Gather(Movement):
    """index_select by a constant index: the index follows what is kept."""

    def moved(self, node: fx.Node, facts: Facts) -> list[fx.Node]:
        return [node.args[0]]

    def indices(self, node: fx.Node, facts: Facts) -> dict[fx.Node, Tensor] | None:
        index = node.args[2]
        return {index: facts[index].content} if is_constant(index, facts) and index is not node.args[0] else None

    def shrink(self, node: fx.Node, plan: Any) -> None:
        source, dim, index = node.args
        dim = dim % len(sizes(source))
        if not plan.full(source, dim) or not plan.full(node, dim):
            place = plan.keep[(source, dim)].long().cumsum(0) - 1
            kept = place[plan.facts[index].content[plan.keep[(node, dim)]]]
            node.update_arg(2, plan.program.add_constant(kept, str(index.target), like=index))


class Pad(Movement):
    """constant_pad_nd: padded dimensions are never cut, the others pass."""

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operand = node.args[0]
        if operand not in facts:
            return None
        fill = argument(node, 2, "value", 0) or 0
        shape = sizes(operand)
        mask = torch.nn.functional.pad(facts[operand].mask.expand(shape), node.args[1], value=True)
        value = torch.nn.functional.pad(facts[operand].value.expand(shape).contiguous(), node.args[1], value=fill)
        return known(mask, value)

    def padded(self, node: fx.Node) -> set[int]:
        amounts, rank = list(node.args[1]), len(sizes(node))
        return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]
        for dim in self.padded(node):
            wanted = wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        operand: fx.Node = node.args[0]
        padded = self.padded(node)
        return [equal(node, (node, d), (operand, d), s) for d, s in enumerate(sizes(operand)) if d not in padded]
