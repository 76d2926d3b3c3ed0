"""Transfer rules of operators that mix elements along some dimensions: pools, reductions, softmax."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, known, sizes, slices
from thresher.analysis.slices.ties import Key, Tie, equal
from thresher.analysis.slices.transfer.base import Facts, TransferRule, argument, aten, evaluate


class Mixing(TransferRule):
    """The rule of operators that mix the elements along some dimensions of their first argument and treat the others alike.

    ``dims(node)`` returns the mixed dimensions, and True if they are gone from the result (a reduction without keepdim).
    """

    supported = True

    def __init__(self, dims: Callable[[fx.Node], tuple[list[int], bool]]):
        self.dims = dims

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operand: fx.Node = node.args[0]
        if operand not in facts:
            return None
        mixed, removed = self.dims(node)
        shape = sizes(operand)
        mask = facts[operand].mask
        for dim in mixed:
            mask = mask.all(dim, keepdim=True)
        if not bool(mask.any()):
            return None
        value = facts[operand].value
        value = value.expand([shape[d] if d in mixed else value.shape[d] for d in range(len(shape))])
        value = evaluate(node, {operand: value.contiguous()})
        if removed:
            mask = mask.squeeze(mixed)
        return known(mask, value)

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        operand: fx.Node = node.args[0]
        mixed, removed = self.dims(node)
        for dim in sorted(mixed):
            wanted = wanted.unsqueeze(dim) if removed else wanted.any(dim, keepdim=True)
        return {operand: wanted}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the dimensions that are not mixed."""
        operand: fx.Node = node.args[0]
        mixed, removed = self.dims(node)
        kept = [d for d in range(len(sizes(operand))) if d not in mixed]
        positions = range(len(kept)) if removed else kept
        return [equal(node, (node, e), (operand, d), sizes(operand)[d]) for d, e in zip(kept, positions)]


class Softmax(Mixing):
    """The rule of softmax: -inf becomes 0 for all values of the rest of its row (unless all of the row is -inf).

    So an index at which every row is -inf can go, and the rest is what it was.
    """

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        operand: fx.Node = node.args[0]
        if operand not in facts or not bool((facts[operand].content == -torch.inf).any()):
            return super().forward(node, facts)
        dim = self.dims(node)[0][0]
        closed = self.closed(node, facts)
        whole = closed.expand([s if d == dim else closed.shape[d] for d, s in enumerate(sizes(operand))])
        return known(whole & ~whole.all(dim, keepdim=True), torch.zeros([1] * closed.dim(), dtype=torch.float64))

    def closed(self, node: fx.Node, facts: Facts) -> Tensor:
        """Return which elements of the argument are known to be -inf (narrow)."""
        return facts[node.args[0]].mask & (facts[node.args[0]].content == -torch.inf)

    def open_indices(self, node: fx.Node, facts: Facts) -> Tensor:
        """Return the indices along the softmax at which some row may be more than -inf (bool); all where every index is closed."""
        dim = self.dims(node)[0][0]
        size = sizes(node)[dim]
        if node.args[0] not in facts:
            return torch.ones(size, dtype=torch.bool)
        opened = ~slices(self.closed(node, facts), dim, size, every=True)
        return opened if bool(opened.any()) else ~opened

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie the softmax's own dimension, too, where some of it can go."""
        ties, dim = super().constraints(node, facts), self.dims(node)[0][0]
        if bool(self.open_indices(node, facts).all()):
            return ties
        return [*ties, equal(node, (node, dim), (node.args[0], dim), sizes(node)[dim])]

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Pin the indices that are not closed."""
        opened = self.open_indices(node, facts)
        return [] if bool(opened.all()) else [((node, self.dims(node)[0][0]), opened)]


def spatial(node: fx.Node) -> tuple[list[int], bool]:
    """Return the dimensions that pools and resizes mix: the last one, two or three, by the operator's name."""
    digit = re.search(r"(\d)d", str(node.target))
    count, rank = int(digit[1]) if digit else 0, len(sizes(node))
    return list(range(rank - count, rank)), False


def along(position: int) -> Callable[[fx.Node], tuple[list[int], bool]]:
    """Return the ``dims`` of softmax and cumsum: they mix the dimension that is their argument at ``position``, which stays."""

    def dims(node: fx.Node) -> tuple[list[int], bool]:
        return [node.args[position] % len(sizes(node))], False

    return dims


def reduced(node: fx.Node) -> tuple[list[int], bool]:
    """Return the dimensions that mean, sum, amax and others reduce: their second argument; they go unless keepdim."""
    rank = len(sizes(node.args[0]))
    dims = argument(node, 1, "dim")
    dims = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    keepdim = (
        bool(argument(node, 2, "keepdim", False))
        if node.target is not aten.var.correction
        else bool(node.kwargs.get("keepdim", False))
    )
    return sorted(d % rank for d in dims), not keepdim


def normed(node: fx.Node) -> tuple[list[int], bool]:
    """Return the dimensions that linalg_vector_norm reduces: its third argument; they go unless keepdim."""
    rank = len(sizes(node.args[0]))
    dims = argument(node, 2, "dim")
    dims = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    return sorted(d % rank for d in dims), not argument(node, 3, "keepdim", False)
