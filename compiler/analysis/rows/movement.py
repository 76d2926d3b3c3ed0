"""Operators that only move elements: their rows are found by running them on element numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.facts import Known, compress, known, sizes, slices
from thresher.analysis.rows.base import Facts, Row, argument, aten, concrete, evaluate, mask_of, nothing, tensors
from thresher.analysis.ties import Key, Tie, equal


class Movement(Row):
    """Operators that only move elements: every element of the result is one element of one argument.

    All questions are answered by running the operator itself: on the facts (forward), and on a tensor of element numbers
    (backward, ties). So a row needs only say how its literals change.
    """

    supported = True

    def __init__(self, fix: Callable[[fx.Node, Any], None] | None = None):
        self.fix = fix

    def sources(self, node: fx.Node) -> Tensor:
        """For each element of the result the number of the argument's element it is; arguments are numbered one after the other."""
        values, start = {}, 0
        for operand in tensors(node):
            shape = sizes(operand)
            values[operand] = torch.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)
        return evaluate(node, values)

    def known(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = tensors(node)
        if not any(n in facts for n in operands):
            return None
        masks = {n: mask_of(n, facts).expand(sizes(n)) for n in operands}
        values = {n: (facts[n].value if n in facts else nothing(n)).expand(sizes(n)) for n in operands}
        return known(evaluate(node, masks), evaluate(node, values))

    def read(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands = tensors(node)
        source = self.sources(node)
        total = sum(math.prod(sizes(n)) for n in operands)
        if bool(wanted.all()) and source.numel() == total:
            return {n: torch.ones([1] * len(sizes(n)), dtype=torch.bool) for n in operands}
        flat = torch.zeros(total, dtype=torch.bool)
        flat[source[wanted.expand(source.shape)]] = True
        parts = flat.split([math.prod(sizes(n)) for n in operands])
        return {n: compress(part.reshape(sizes(n))) for n, part in zip(operands, parts)}

    def ties(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found: list[Tie] = []
        source, start = self.sources(node), 0
        for operand in tensors(node):
            shape = sizes(operand)
            count = math.prod(shape)
            inside = (source >= start) & (source < start + count)
            found += _movement_ties(node, operand, shape, source - start, inside)
            start += count
        return found

    def shrink(self, node: fx.Node, plan: Any) -> None:
        if self.fix is not None:
            self.fix(node, plan)


def _movement_ties(
    node: fx.Node, operand: fx.Node, shape: tuple[int, ...], source: Tensor, inside: Tensor
) -> list[Tie]:
    """Ties between the dimensions of one argument and those of the result, from the element numbers in ``source``."""
    if not bool(inside.any()):
        return []
    lows, highs = [], []
    for dim in range(source.dim()):
        present = slices(inside, dim, source.shape[dim], every=False).nonzero().reshape(-1)
        lows.append(int(present[0]))
        highs.append(int(present[-1]) + 1)
    box = source[tuple(slice(a, b) for a, b in zip(lows, highs))]
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    places = {d: (box // strides[d]) % shape[d] for d in range(len(shape)) if shape[d] > 1}
    depends = {
        d: {e for e in range(box.dim()) if bool((place != place.narrow(e, 0, 1)).any())} for d, place in places.items()
    }
    found: list[Tie] = []
    for dims, outs in _groups(depends):
        corner = tuple(slice(None) if e in outs else 0 for e in range(box.dim()))
        left_sizes = tuple(shape[d] for d in dims)
        index = torch.zeros(tuple(box.shape[e] for e in outs), dtype=torch.long)
        for d in dims:
            index = index * shape[d] + places[d][corner]
        out_sizes = tuple(source.shape[e] for e in outs)
        if len(outs) == 1 and out_sizes[0] != box.shape[outs[0]]:  # a part of a concatenation
            found.append(
                _Segment(
                    node,
                    tuple((operand, d) for d in dims),
                    ((node, outs[0]),),
                    left_sizes,
                    out_sizes,
                    index,
                    lows[outs[0]],
                )
            )
        elif out_sizes == tuple(index.shape):
            found.append(
                Tie(
                    node,
                    tuple((operand, d) for d in dims),
                    tuple((node, e) for e in outs),
                    left_sizes,
                    out_sizes,
                    index,
                )
            )
    tied = {key for tie in found for key in tie.keys}
    for e, (low, size) in enumerate(zip(lows, box.shape)):  # a part of one index is tied to nothing, and must stay
        if size < source.shape[e] and (node, e) not in tied:
            nowhere = torch.zeros(size, dtype=torch.long)
            found.append(_Segment(node, (), ((node, e),), (), (source.shape[e],), nowhere, low))
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
