"""Operators that only move elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, compress, known, reduce_to, sizes
from thresher.analysis.slices.ties import Key, Tie, equal
from thresher.analysis.slices.transfer.base import (
    Facts,
    TransferRule,
    argument,
    aten,
    concrete,
    evaluate,
    is_constant,
    mask_of,
    nothing,
    tensors,
)
from thresher.analysis.slices.transfer.maps import Map, map_of


class Movement(TransferRule):
    """Operators that only move elements: every element of the result is one element of one argument.

    All questions are answered by running the operator itself on coordinates (``maps``), so a row needs only say how its literals
    change.
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

    def map(self, node: fx.Node, facts: Facts) -> Map | None:
        indices = self.indices(node, facts)
        return None if indices is None else map_of(node, self.moved(node, facts), indices)

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = self.moved(node, facts)
        if not any(n in facts for n in operands) or (found := self.map(node, facts)) is None:
            return None
        masks = [mask_of(n, facts) for n in operands]
        values = [facts[n].value if n in facts else nothing(n) for n in operands]
        if found.exact:
            return known(found.forward(masks), found.forward(values))
        indices = self.indices(node, facts) or {}
        whole = (dict(zip(operands, (t.expand(sizes(n)) for n, t in zip(operands, part)))) for part in (masks, values))
        return known(*(evaluate(node, part | indices) for part in whole))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands, found = self.moved(node, facts), self.map(node, facts)
        if found is None:
            return super().backward(node, wanted, facts)
        result = {n: torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in tensors(node)}  # an index is no value
        if found.exact:
            return result | {n: a.backward(wanted) for n, a in zip(operands, found.arguments)}
        return result | self.sources(node, wanted, operands, self.indices(node, facts) or {})

    def sources(self, node: fx.Node, wanted: Tensor, operands: list[fx.Node], indices: dict) -> dict[fx.Node, Tensor]:
        """Which elements of the operands the wanted ones are, by their numbers."""
        counts = [math.prod(sizes(n)) for n in operands]
        numbers = torch.arange(sum(counts)).split(counts)
        source = evaluate(node, {n: part.reshape(sizes(n)) for n, part in zip(operands, numbers)} | indices)
        flat = torch.zeros(sum(counts), dtype=torch.bool)
        flat[source[wanted.expand(source.shape)]] = True
        return {n: compress(part.reshape(sizes(n))) for n, part in zip(operands, flat.split(counts))}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = self.map(node, facts)
        if found is None:
            return []
        operands = self.moved(node, facts)
        return [part.between(node, n) for n, a in zip(operands, found.arguments) for part in a.parts]

    def narrow(self, node: fx.Node, plan: Any) -> None:
        if self.fix is not None:
            self.fix(node, plan)


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

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        found = super().constraints(node, facts)
        if argument(node, 4, "step", 1) == 1:
            return found
        dim = argument(node, 1, "dim", 0) % len(sizes(node))
        return [t for t in found if (node, dim) not in t.keys]


class Roll(Movement):
    """roll along dimensions: by as many places as kept indices come around the end. Of the flattened value: nothing is cut."""

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        return super().constraints(node, facts) if argument(node, 2, "dims", []) else []

    def narrow(self, node: fx.Node, plan: Any) -> None:
        operand, shifts, dims = node.args[0], node.args[1], argument(node, 2, "dims", [])
        keeps = [plan.keep[(operand, dim % len(sizes(operand)))] for dim in dims]
        places = [int(keep[len(keep) - shift % len(keep) :].sum()) for keep, shift in zip(keeps, shifts)]
        node.args, node.kwargs = (operand, places, dims), {}


class Concat(Movement):
    """cat, stack: an argument of which nothing is kept is left out."""

    def narrow(self, node: fx.Node, plan: Any) -> None:
        out = set()
        for operand, argument_ in zip(tensors(node), map_of(node, tensors(node), {}).arguments):
            spans = zip(argument_.lows, argument_.highs, sizes(node))
            joined = [(e, low, high) for e, (low, high, size) in enumerate(spans) if high - low < size]
            if any(not bool(plan.keep[(node, e)][low:high].any()) for e, low, high in joined):
                out.add(operand)
        if out:
            plan.leave_out(node, out)


class PixelShuffle(Movement):
    """pixel_shuffle, pixel_unshuffle: whole blocks of channels go. Rows and columns stay, or the blocks would have holes."""

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        values, rank = (node, node.args[0]), len(sizes(node))
        return [((v, d), torch.ones(sizes(v)[d], dtype=torch.bool)) for v in values for d in (rank - 2, rank - 1)]


class Gather(Movement):
    """index_select by a constant index: the index follows what is kept."""

    def moved(self, node: fx.Node, facts: Facts) -> list[fx.Node]:
        return [node.args[0]]

    def indices(self, node: fx.Node, facts: Facts) -> dict[fx.Node, Tensor] | None:
        index = node.args[2]
        return {index: facts[index].content} if is_constant(index, facts) and index is not node.args[0] else None

    def narrow(self, node: fx.Node, plan: Any) -> None:
        source, dim, index = node.args
        dim = dim % len(sizes(source))
        if not plan.full(source, dim) or not plan.full(node, dim):
            place = plan.keep[(source, dim)].long().cumsum(0) - 1
            kept = place[plan.facts[index].content[plan.keep[(node, dim)]]]
            node.update_arg(2, plan.program.add_constant(kept, str(index.target), like=index))


class Written(TransferRule):
    """index_put along one dimension (a cache of keys): along the others each element comes from its own place. Nothing is cut."""

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        x, indices, values = node.args[:3]
        result = super().backward(node, wanted, facts)
        dims = [d for d, i in enumerate(indices) if i is not None]
        alike = len(sizes(values)) == len(sizes(x)) and len({x, values, indices[dims[0]]}) == 3
        if len(dims) == 1 and alike and len(sizes(indices[dims[0]])) == 1:
            result |= {x: wanted, values: reduce_to(wanted.any(dims[0], keepdim=True), sizes(values))}
        return result


class Pad(Movement):
    """constant_pad_nd: padded dimensions are never cut, the others pass."""

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operand, fill = node.args[0], argument(node, 2, "value", 0) or 0
        shape, padded = sizes(operand), self.padded(node)
        value = facts[operand].value if operand in facts else nothing(operand)

        def whole(narrow: Tensor) -> Tensor:
            return narrow.expand([s if d in padded else narrow.shape[d] for d, s in enumerate(shape)]).contiguous()

        amounts = node.args[1]
        mask = torch.nn.functional.pad(whole(mask_of(operand, facts)), amounts, value=True)
        return known(mask, torch.nn.functional.pad(whole(value), amounts, value=fill))

    def padded(self, node: fx.Node) -> set[int]:
        amounts, rank = list(node.args[1]), len(sizes(node))
        return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]
        for dim in self.padded(node):
            wanted = wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        operand: fx.Node = node.args[0]
        padded = self.padded(node)
        return [equal(node, (node, d), (operand, d), s) for d, s in enumerate(sizes(operand)) if d not in padded]
