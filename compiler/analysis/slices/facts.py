"""Facts about slices of values, as tensors.

A fact of a value of shape ``S`` is stored *narrow*: a tensor of the same rank that broadcasts to ``S``, with size 1 along every
dimension where it does not vary. A fact about channels of an image is ``[1, C, 1, 1]``, whatever the image's size.

* ``Known``: ``mask`` says which elements do not depend on any input, ``content`` holds what they are (0 elsewhere).
* read:      a boolean tensor; False where no output of the graph depends on the element.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from thresher.ir.nodes import shape_of
from thresher.ir.sizes import Numbers, number

_ASSUMED: ContextVar[Numbers | None] = ContextVar("_ASSUMED", default=None)
BLOCK_SIZE = 1 << 20  # bytes, or elements, that stay in the cache between two steps


@dataclass(frozen=True)
class Known:
    """The elements of a value that are constant. ``mask`` and ``content`` are narrow and need not vary along the same dimensions.

    The content of a weight is the weight itself, in its own dtype and without a copy.
    """

    mask: Tensor
    content: Tensor

    @property
    def value(self) -> Tensor:
        """The content in float64, or as it is where it is not floating."""
        return self.content.double() if self.content.is_floating_point() else self.content

    @functools.cached_property
    def connections(self) -> Connections:
        """The connections of a weight: from inputs (dimension 1) to outputs (dimension 0). They are computed once."""
        return Connections.of(self.content)

    def all(self) -> bool:
        """Return whether every element is known."""
        return bool(self.mask.all())

    def zero(self) -> Tensor:
        """Return which elements are known to be 0 (narrow)."""
        return self.mask & (self.content == 0)


@dataclass(frozen=True)
class Connections:
    """The nonzero pattern of a matrix as bits, eight columns a byte: 1/32 of a float32 weight, and a question is one pass over that."""

    bits: np.ndarray  # uint8 [rows, columns / 8]
    columns: int

    @staticmethod
    def of(weight: Tensor) -> Connections:
        """Return the nonzero elements of a weight ``[rows, columns, *taps]``; an element is nonzero if any of its taps is."""
        packed = []
        for rows in weight.split(max(1, BLOCK_SIZE // max(1, weight[:1].numel()))):
            used = rows != 0
            packed.append(np.packbits(used.flatten(2).any(2).numpy() if used.dim() > 2 else used.numpy(), axis=1))
        return Connections(np.concatenate(packed), weight.shape[1])

    def rows_from(self, columns: Tensor) -> Tensor:
        """Return the rows (bool) that are connected to one of ``columns`` (bool)."""
        return torch.from_numpy((self.bits & np.packbits(columns.numpy())).any(1))

    def columns_from(self, rows: Tensor) -> Tensor:
        """Return the columns (bool) that are connected to one of ``rows`` (bool)."""
        joined = np.bitwise_or.reduce(self.bits[rows.numpy()], axis=0)
        return torch.from_numpy(np.unpackbits(joined, count=self.columns).astype(bool))


@contextmanager
def assuming(numbers: Numbers) -> Iterator[None]:
    """Within the block, free sizes have these numbers instead of those of the example."""
    token = _ASSUMED.set(numbers)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def hint(dim: int | torch.SymInt) -> int:
    """Return a size as a number: that of the example, or what is assumed."""
    if not isinstance(dim, torch.SymInt):
        return int(dim)
    if assumed := _ASSUMED.get():
        return int(number(dim, assumed))
    example = dim.node.hint
    return int(example) if example is not None else 2


def sizes(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node, with the numbers of :func:`hint` for free sizes."""
    return tuple(hint(d) for d in shape_of(node))


def compress(tensor: Tensor) -> Tensor:
    """Return the narrow form of a tensor: each dimension along which it is constant gets size 1."""
    for dim in range(tensor.dim()):
        if tensor.shape[dim] > 1:
            first, last = tensor.narrow(dim, 0, 1), tensor.narrow(dim, tensor.shape[dim] - 1, 1)
            if tensor.stride(dim) == 0 or (torch.equal(first, last) and bool((tensor == first).all())):
                tensor = first
    return tensor.contiguous()


def known(mask: Tensor, value: Tensor) -> Known | None:
    """Return a :class:`Known` with mask and value compressed, or None where nothing is known."""
    if not bool(mask.any()):
        return None
    mask = compress(mask)
    zero = torch.zeros((), dtype=value.dtype)
    return Known(mask, compress(torch.where(mask, value, zero)))


def along_free(tensor: Tensor, node: fx.Node) -> list[int]:
    """Return the free dimensions of ``node`` along which ``tensor``, a fact of it, varies."""
    return [d for d, size in enumerate(shape_of(node)) if isinstance(size, torch.SymInt) and tensor.shape[d] > 1]


def for_any_size(node: fx.Node, fact: Known | None, other: Known | None) -> Known | None:
    """Return what is known of ``node`` for any free size, from what is for the example's sizes and for others.

    It is the same in both, and does not vary along a free dimension.
    """
    facts = [_without_variation(f, node) for f in (fact, other) if f is not None]
    if len(facts) < 2:
        return None
    (mask, value), (other_mask, other_value) = facts
    return known(mask & other_mask & ((value == other_value) | (value.isnan() & other_value.isnan())), value)


def _without_variation(fact: Known, node: fx.Node) -> tuple[Tensor, Tensor]:
    mask, value = fact.mask, fact.value
    for dim in range(mask.dim()):
        if not isinstance(shape_of(node)[dim], torch.SymInt):
            continue
        first = value.narrow(dim, 0, 1) if value.shape[dim] > 0 else value
        same = ((value == first) | (value.isnan() & first.isnan())).all(dim, keepdim=True)
        mask, value = mask.all(dim, keepdim=True) & same, first
    return mask, value


def known_constant(tensor: Tensor) -> Known:
    """Return the fact of a constant: all its elements are known."""
    return Known(torch.ones([1] * tensor.dim(), dtype=torch.bool), tensor.detach())


def reduce_to(fact: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reduce a narrow boolean fact of a value to ``shape``, the shape of an operand that was broadcast to it.

    It is the adjoint of broadcasting: "any" over the dimensions that the operand does not have, or has with size 1.
    """
    while fact.dim() > len(shape):
        fact = fact.any(0)
    for dim, size in enumerate(shape):
        if size == 1 and fact.shape[dim] > 1:
            fact = fact.any(dim, keepdim=True)
    return fact


def slices(fact: Tensor, dim: int, size: int, every: bool) -> Tensor:
    """Return for each index of ``dim`` whether the fact holds for every element of its slice, or for any. Shape ``[size]``."""
    others = [d for d in range(fact.dim()) if d != dim and fact.shape[d] != 1]
    if others:
        fact = fact.all(others) if every else fact.any(others)
    return fact.reshape(-1).expand(size) if fact.numel() == 1 else fact.reshape(-1)


def take(tensor: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """Return ``tensor`` with only the given indices of the given dimensions, in their order.

    Selecting from one dimension after the other would write, and let the system provide, the memory of each step. Here it is done block by
    block, and only the result is allocated whole.
    """
    if len(indices) < 2:
        for dim, index in indices.items():
            tensor = tensor.index_select(dim, index)
        return tensor
    first, *rest = sorted(indices)
    result = tensor.new_empty([indices[d].numel() if d in indices else size for d, size in enumerate(tensor.shape)])
    row_bytes = tensor.numel() // max(tensor.shape[first], 1) * tensor.element_size()
    start = 0
    for block in indices[first].split(max(1, BLOCK_SIZE // max(row_bytes, 1))):
        selected = tensor.index_select(first, block)
        for dim in rest:
            selected = selected.index_select(dim, indices[dim])
        result.narrow(first, start, block.numel()).copy_(selected)
        start += block.numel()
    return result
