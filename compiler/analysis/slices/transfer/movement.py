"""Transfer rules of operators that only move elements."""

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
    """The rule of operators whose result consists of elements of their arguments, moved.

    All questions are answered by running the operator itself on coordinates (``maps``). ``fix(node, plan)`` rewrites the literals of a call
    when indices are cut; None: no literal depends on a size.
    """

    supported = True

    def __init__(self, fix: Callable[[fx.Node, Any], None] | None = None):
        self.fix = fix

    def moved(self, node: fx.Node, facts: Facts) -> list[fx.Node]:
        """Return the arguments whose elements are moved; an index is none."""
        return tensors(node)

    def indices(self, node: fx.Node, facts: Facts) -> dict[fx.Node, Tensor] | None:
        """Return the content of the other tensor arguments; None where one of them is not constant."""
        return {}

    def map(self, node: fx.Node, facts: Facts) -> Map | None:
        """Return where the elements of the result come from; None where an index is not constant, or the result has no elements."""
        indices = self.indices(node, facts)
        return None if indices is None or 0 in sizes(node) else map_of(node, self.moved(node, facts), indices)

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operands = self.moved(node, facts)
        if not any(n in facts for n in operands) or (movement := self.map(node, facts)) is None:
            return None
        masks = [mask_of(n, facts) for n in operands]
        values = [facts[n].value if n in facts else nothing(n) for n in operands]
        if movement.exact:
            return known(movement.forward(masks), movement.forward(values))
        indices = self.indices(node, facts) or {}
        whole = (dict(zip(operands, (t.expand(sizes(n)) for n, t in zip(operands, part)))) for part in (masks, values))
        return known(*(evaluate(node, part | indices) for part in whole))

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operands, movement = self.moved(node, facts), self.map(node, facts)
        if movement is None:
            return super().backward(node, wanted, facts)
        result = {n: torch.zeros([1] * len(sizes(n)), dtype=torch.bool) for n in tensors(node)}  # an index is no value
        if movement.exact:
            return result | {n: a.backward(wanted) for n, a in zip(operands, movement.arguments)}
        return result | self.sources(node, wanted, operands, self.indices(node, facts) or {})

    def sources(self, node: fx.Node, wanted: Tensor, operands: list[fx.Node], indices: dict) -> dict[fx.Node, Tensor]:
        """Return which elements of the operands the wanted ones are, by numbering all elements."""
        counts = [math.prod(sizes(n)) for n in operands]
        numbers = torch.arange(sum(counts)).split(counts)
        source = evaluate(node, {n: part.reshape(sizes(n)) for n, part in zip(operands, numbers)} | indices)
        flat = torch.zeros(sum(counts), dtype=torch.bool)
        flat[source[wanted.expand(source.shape)]] = True
        return {n: compress(part.reshape(sizes(n))) for n, part in zip(operands, flat.split(counts))}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie each group of dimensions of an argument to the dimensions of the result that it is moved to."""
        movement = self.map(node, facts)
        if movement is None:
            return []
        operands = self.moved(node, facts)
        return [group.tie(node, n) for n, a in zip(operands, movement.arguments) for group in a.groups]

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Rewrite the literals of the call."""
        if self.fix is not None:
            self.fix(node, plan)


def fix_sizes(position: int) -> Callable[[fx.Node, Any], None]:
    """Return the ``fix`` of view, reshape and expand: the sizes, their argument at ``position``, become the numbers of kept indices."""

    def fix(node: fx.Node, plan: Any) -> None:
        old = list(node.args[position])
        new = [
            s if isinstance(s, fx.Node) or s == -1 or plan.full(node, d) else plan.count(node, d)
            for d, s in enumerate(old)
        ]
        node.update_arg(position, new)

    return fix


def fix_slice(node: fx.Node, plan: Any) -> None:
    """Rewrite the bounds of a slice as positions among the kept indices."""
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
    """Squeeze only dimensions that had one index before: one that was cut down to one index stays."""
    before = sizes(node.args[0])
    dims = argument(node, 1, "dim", range(len(before)))
    dims = [dims] if isinstance(dims, int) else dims
    node.target, node.kwargs = aten.squeeze.dims, {}
    node.args = (node.args[0], [d % len(before) for d in dims if before[d] == 1])


def fix_select(node: fx.Node, plan: Any) -> None:
    """Rewrite the index of a select as its position among the kept ones."""
    operand, dim, index = node.args
    dim = dim % len(sizes(operand))
    if not plan.full(operand, dim):
        index = index % sizes(operand)[dim]
        node.args = (operand, dim, int(plan.keep[(operand, dim)][:index].sum()))


class Slice(Movement):
    """The rule of slice; with a step other than 1 its dimension is not cut."""

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie as a movement does, but not the sliced dimension if the step is not 1."""
        ties = super().constraints(node, facts)
        if argument(node, 4, "step", 1) == 1:
            return ties
        dim = argument(node, 1, "dim", 0) % len(sizes(node))
        return [t for t in ties if (node, dim) not in t.keys]


class Roll(Movement):
    """The rule of roll along dimensions. A roll of the flattened value is not cut."""

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie as a movement does, if dimensions are named."""
        return super().constraints(node, facts) if argument(node, 2, "dims", []) else []

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Roll by the number of kept indices that come around the end."""
        operand, shifts, dims = node.args[0], node.args[1], argument(node, 2, "dims", [])
        keeps = [plan.keep[(operand, dim % len(sizes(operand)))] for dim in dims]
        shifts_of_kept = [int(keep[len(keep) - shift % len(keep) :].sum()) for keep, shift in zip(keeps, shifts)]
        node.args, node.kwargs = (operand, shifts_of_kept, dims), {}


class Concat(Movement):
    """The rule of cat and stack."""

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Leave out the arguments of which nothing is kept."""
        empty = set()
        for operand, argument_ in zip(tensors(node), map_of(node, tensors(node), {}).arguments):
            spans = zip(argument_.lows, argument_.highs, sizes(node))
            joined = [(e, low, high) for e, (low, high, size) in enumerate(spans) if high - low < size]
            if any(not bool(plan.keep[(node, e)][low:high].any()) for e, low, high in joined):
                empty.add(operand)
        if empty:
            plan.leave_out(node, empty)


class PixelShuffle(Movement):
    """The rule of pixel_shuffle and pixel_unshuffle: whole blocks of channels go."""

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin rows and columns: without some of them the blocks would have holes."""
        values, rank = (node, node.args[0]), len(sizes(node))
        return [((v, d), torch.ones(sizes(v)[d], dtype=torch.bool)) for v in values for d in (rank - 2, rank - 1)]


class Gather(Movement):
    """The rule of index_select by a constant index."""

    def moved(self, node: fx.Node, facts: Facts) -> list[fx.Node]:
        return [node.args[0]]

    def indices(self, node: fx.Node, facts: Facts) -> dict[fx.Node, Tensor] | None:
        index = node.args[2]
        return {index: facts[index].content} if is_constant(index, facts) and index is not node.args[0] else None

    def narrow(self, node: fx.Node, plan: Any) -> None:
        """Replace the index by one into what is kept."""
        source, dim, index = node.args
        dim = dim % len(sizes(source))
        if not plan.full(source, dim) or not plan.full(node, dim):
            position = plan.keep[(source, dim)].long().cumsum(0) - 1
            kept = position[plan.facts[index].content[plan.keep[(node, dim)]]]
            node.update_arg(2, plan.program.add_constant(kept, str(index.target), like=index))


class Written(TransferRule):
    """The rule of index_put along one dimension (a cache of keys). Nothing is cut; along the other dimensions elements stay apart."""

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        x, indices, values = node.args[:3]
        result = super().backward(node, wanted, facts)
        dims = [d for d, i in enumerate(indices) if i is not None]
        alike = len(sizes(values)) == len(sizes(x)) and len({x, values, indices[dims[0]]}) == 3
        if len(dims) == 1 and alike and len(sizes(indices[dims[0]])) == 1:
            result |= {x: wanted, values: reduce_to(wanted.any(dims[0], keepdim=True), sizes(values))}
        return result


class Pad(Movement):
    """The rule of constant_pad_nd: padded dimensions are not cut, the others pass."""

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
        """Return the padded dimensions."""
        amounts, rank = list(node.args[1]), len(sizes(node))
        return {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]
        for dim in self.padded(node):
            wanted = wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the dimensions that are not padded."""
        operand: fx.Node = node.args[0]
        padded = self.padded(node)
        return [equal(node, (node, d), (operand, d), s) for d, s in enumerate(sizes(operand)) if d not in padded]
