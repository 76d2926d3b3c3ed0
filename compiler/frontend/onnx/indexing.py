"""ONNX operators that read and write by index, in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, rule
from thresher.frontend.onnx.values import Unsupported, Value, combined


def wrapped(index: Tensor, size: int) -> Tensor:
    """Return indices as int64, negative ones counted from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


@rule("Slice", since=10)
def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    """Return x[starts:ends:steps] along the axes; negative steps pick by index."""
    for start, end, axis, step in zip(starts, ends, axes or range(len(starts)), steps or [1] * len(starts)):
        if step > 0:
            axis_slice: list[slice] = [slice(None)] * x.dim()
            axis_slice[axis] = slice(start, end, step)
            x = x[tuple(axis_slice)]
        else:
            size = int(x.shape[axis])
            indices = list(range(size))[start : None if end < -size else end : step]
            x = x.index_select(axis, torch.tensor(indices, dtype=torch.int64))
    return x


@rule("Slice")
def slice_by_attributes(
    x: Tensor, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None
) -> Tensor:
    """Return x[starts:ends] along the axes."""
    return slice_(x, starts, ends, axes)


@rule("Gather")
def gather(x: Tensor, indices: Value, *, axis: int) -> Tensor:
    """Return the elements of x at indices along an axis; rows of a matrix as an embedding."""
    if indices.constant and indices.data.dim() == 0:
        return x.select(axis, indices.numbers("indices"))
    axis = axis % x.dim()
    index = combined(lambda i: wrapped(i, x.shape[axis]), indices).tensor()
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(index, x)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@rule("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int) -> Tensor:
    """Return for each index the element of x at it along an axis."""
    return torch.gather(x, axis, wrapped(indices, x.shape[axis]))


@rule("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Return the slices of x at the coordinates that are the last dimension of ``indices``."""
    batch = x.shape[:batch_dims]
    flat = x.reshape(-1, *x.shape[batch_dims:])
    depth = indices.shape[-1]
    coordinates = indices.reshape(math.prod(batch), -1, depth)
    samples = torch.arange(math.prod(batch)).reshape(-1, 1).expand(coordinates.shape[:2])
    columns = [wrapped(coordinates[..., d], flat.shape[d + 1]) for d in range(depth)]
    return flat[(samples, *columns)].reshape(*indices.shape[:-1], *x.shape[batch_dims + depth :])


REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@rule("ScatterElements", unsigned="order")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int, reduction: str = "none") -> Tensor:
    """Return x with updates written, or added, multiplied or compared, at indices along an axis."""
    index = wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    if reduction not in REDUCTIONS:
        raise Unsupported(f"the reduction {reduction}")
    return x.scatter_reduce(axis, index, updates, REDUCTIONS[reduction])


@rule("Scatter", unsigned="order")
def scatter(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int) -> Tensor:
    """Return x with updates written at indices along an axis."""
    return scatter_elements(x, indices, updates, axis=axis)


@rule("ScatterND", unsigned="order")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Return x with updates written, or added, multiplied or compared, at the coordinates that are the last dimension of ``indices``."""
    depth = indices.shape[-1]
    width = math.prod(x.shape[depth:])
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for d in range(depth):
        row = row * x.shape[d] + wrapped(indices[..., d], x.shape[d])
    flat, new = x.reshape(-1, width), updates.reshape(-1, width)
    index = row.reshape(-1, 1).expand(new.shape)
    return scatter_elements(flat, index, new, axis=0, reduction=reduction).reshape(x.shape)


@rule("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int, mode: str
) -> Tensor:
    """Return a cache [batch, ...] with new entries of each sample written from its index on, circularly if the mode says so."""
    axis = axis % cache.dim()
    count, length = update.shape[axis], cache.shape[axis]
    first = torch.zeros(cache.shape[0], dtype=torch.int64) if write_indices is None else write_indices
    index = first.reshape(-1, 1) + torch.arange(count)
    if mode == "circular":
        index = index % length
    sizes = [1] * cache.dim()
    sizes[0], sizes[axis] = index.shape
    return cache.scatter(axis, index.reshape(sizes).expand(update.shape), update)


@rule("OneHot", unsigned="native")
def one_hot(indices: Tensor, depth: Ints, values: Tensor, *, axis: int) -> Tensor:
    """Return the second of two values where an index is the position in a new dimension, else the first."""
    off, on = values.select(0, 0), values.select(0, 1)
    index = indices.to(torch.int64)
    index = torch.where(index < 0, index + depth[0], index)
    new_axis = axis % (indices.dim() + 1)
    positions = torch.arange(depth[0]).reshape(-1, *[1] * (indices.dim() - new_axis))
    return torch.where(index.unsqueeze(new_axis) == positions, on, off)


@rule("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int, time_axis: int) -> Tensor:
    """Return x with the first entries of each sample, as many as its length, in reverse order."""
    steps = torch.arange(x.shape[time_axis]).reshape(1, -1)
    length = lengths.reshape(-1, 1)
    index = torch.where(steps < length, length - 1 - steps, steps)
    index = index if batch_axis == 0 else index.mT
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return torch.gather(x, time_axis, index)


@rule("Compress")
def compress(x: Tensor, condition: Value, *, axis: int | None = None) -> Tensor:
    """Return the slices of x along an axis, without one the elements, for which the condition holds."""
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return x.index_select(axis, combined(lambda c: c.nonzero().reshape(-1), condition).tensor())


@rule("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """Return the coordinates of the elements that are not 0, one row for each dimension."""
    return torch.nonzero(x).mT if x.dim() else torch.nonzero(x.reshape(1)).mT[:0]


@rule("Unique", unsigned="order")
def unique(x: Tensor, *, axis: int | None = None, sorted: int) -> Sequence[Tensor]:
    """Return different values, in order or as they come, the index of the first of each, of which each element is one, and counts."""
    keys = x.reshape(-1) if axis is None else x
    dim = 0 if axis is None else axis % x.dim()
    values, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True, dim=dim)
    count, length = values.shape[dim], keys.shape[dim]
    first = torch.full((count,), length).scatter_reduce(0, inverse, torch.arange(length), "amin")
    if sorted:
        return values, first, inverse, counts
    order = torch.argsort(first)
    rank = torch.argsort(order)
    return values.index_select(dim, order), first[order], rank[inverse], counts[order]
