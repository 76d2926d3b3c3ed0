"""Writes at indices that are known only when the model runs: ``index_put``, ``masked_scatter``, ``scatter_add``, ``scatter_reduce``; and so
``x[i] = v``, ``index_copy``, ``index_add``: a cache of keys and values.

On a CPU the values are written in their order (``writes.py``). On a GPU no element is written twice: every element of the result looks
for the value that is written to it.

writer[p] = max { j : index[j] = p },  out[p] = writer[p] < 0 ? x[p] : values[writer[p]]      the last one that writes p
out[p]    = x[p] + sum over j of (index[j] = p ? values[j] : 0)                               where writes add up

so that threads need not wait for each other, on any target; an index outside of ``x`` writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from thresher.backends.tvm.importing.converters.registry import R, aten, axis, result_dtype, semantics, sizes
from thresher.backends.tvm.importing.converters.writes import emit_scatter, write_at_indices
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu.scatter import Scatter
from thresher.backends.tvm.kernels.extrema import limit
from thresher.ir.nodes import dtype_of, shape_of


@semantics(aten.index_put.default)
def index_put(importer: Importer, node: fx.Node) -> Any:
    """Write values at indices or where a mask is set; refuses masks beside other indices, and masked writes that add up."""
    x, indexed, values, *rest = node.args
    accumulate = bool(rest and rest[0])
    dims = [d for d, i in enumerate(indexed) if i is not None]
    indices = [indexed[d] for d in dims]
    if any(dtype_of(i) is torch.bool for i in indices):
        if len(indices) != 1 or dims != [0] or accumulate:
            raise NotImplementedError("a mask beside other indices, or masked writes that add up")
        return _masked(importer, x, indices[0], values)
    return _at_indices(importer, node, dims, indices, accumulate)


@semantics(aten.masked_scatter.default)
def masked_scatter(importer: Importer, node: fx.Node) -> Any:
    """Write the elements of a source, in their order, where a mask is set."""
    x, mask, source = node.args
    flat = importer.emit(R.reshape(importer.value(source), [-1]))
    wide = importer.emit(R.broadcast_to(importer.value(mask), importer.value(x).ty.shape))
    return _take_in_order(importer, importer.value(x), wide, flat)


@semantics(aten.scatter_add.default)
def scatter_add(importer: Importer, node: fx.Node) -> Any:
    """Add the elements of a source to those that an index names along one dimension."""
    return _reduced(importer, node, "sum", True)


@semantics(aten.scatter_reduce.two)
def scatter_reduce(importer: Importer, node: fx.Node) -> Any:
    """Combine the elements of a source (sum, mean, prod, amax, amin) with those that an index names along one dimension."""
    if dtype_of(node) is torch.bool:
        raise NotImplementedError("truth values")
    return _reduced(importer, node, node.args[4], bool(node.kwargs.get("include_self", True)))


# ---------------------------------------------------------------------- indices


def _at_indices(importer: Importer, node: fx.Node, dims: list[int], indices: list[fx.Node], accumulate: bool) -> Any:
    """Indices of the dimensions ``dims`` of x, broadcast against each other; the dimensions of what they select come together, in the place
    of the first where ``dims`` are neighbours, else in front."""
    x, values = node.args[0], node.args[2]
    if importer.machine is not None:
        join = (tirx.any if dtype_of(x) is torch.bool else _added) if accumulate else None
        return write_at_indices(importer, node, dims, indices, join)
    shape = list(torch.broadcast_shapes(*(tuple(sizes(i)) for i in indices)))
    count = math.prod(shape)
    flat = [
        importer.emit(R.reshape(R.broadcast_to(importer.value(i), shape), [count])) if list(shape_of(i)) != [count] else importer.value(i)
        for i in indices
    ]  # fmt: skip
    front = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    rank = len(shape_of(x))
    others = [d for d in range(rank) if d not in dims]

    def value_at(tensor: te.Tensor, j: Any, p: Sequence[Any]) -> Any:
        """The value that write ``j`` has for the element ``p``; dimensions of size 1 stand for all."""
        inside = [(j // math.prod(shape[k + 1 :])) % shape[k] for k in range(len(shape))]
        position = [p[d] for d in others]
        position[front:front] = inside
        position = position[len(position) - len(tensor.shape) :]
        return tensor[tuple(tirx.const(0, "int64") if _is_one(s) else i for i, s in zip(position, tensor.shape))]

    def hits(tensors: Sequence[te.Tensor], j: Any, p: Sequence[Any], sizes: Sequence[Any]) -> Any:
        conditions = []
        for tensor, at, size in zip(tensors, p, sizes):
            index = tirx.Cast("int64", tensor[j])
            conditions.append(tirx.Select(index < 0, index + size, index) == at)
        return tirx.all(*conditions)

    if accumulate:

        def added(x: te.Tensor, values: te.Tensor, *index: te.Tensor) -> te.Tensor:
            j = axis(count)
            zero = tirx.const(0, x.dtype)

            def one(*p: Any) -> Any:
                hit = hits(index, j, [p[d] for d in dims], [x.shape[d] for d in dims])
                return te.sum(tirx.Select(hit, value_at(values, j, p), zero), axis=j)

            total = te.compute(x.shape, one, name="written")
            return te.compute(x.shape, lambda *p: x[p] + total[p], name="added")

        return importer.emit_te("index_add", added, *map(importer.value, (x, values)), *flat)

    def last(x: te.Tensor, *index: te.Tensor) -> te.Tensor:
        j = axis(count)
        sizes = [x.shape[d] for d in dims]

        def one(*p: Any) -> Any:
            return te.max(tirx.Select(hits(index, j, p, sizes), j.var, tirx.const(-1, "int64")), axis=j)

        return te.compute(sizes, one, name="place")

    def put(x: te.Tensor, values: te.Tensor, last_writers: te.Tensor) -> te.Tensor:
        def one(*p: Any) -> Any:
            writer = last_writers[tuple(p[d] for d in dims)]
            return tirx.Select(writer < 0, x[p], value_at(values, te.max(writer, tirx.const(0, "int64")), p))

        return te.compute(x.shape, one, name="put")

    last_writers = importer.emit_te("last_writer", last, importer.value(x), *flat)
    return importer.emit_te("index_put", put, importer.value(x), importer.value(values), last_writers)


def _is_one(size: Any) -> bool:
    return hasattr(size, "value") and int(size) == 1


# ---------------------------------------------------------------------- masks


def _masked(importer: Importer, x: fx.Node, mask: fx.Node, values: fx.Node) -> Any:
    """Compute ``x[mask] = values``; the mask covers the first dimensions."""
    whole, rank = importer.value(x), len(shape_of(x))
    missing = rank - len(shape_of(mask))
    wide = importer.emit(R.reshape(importer.value(mask), [*map(int, shape_of(mask)), *[1] * missing]))
    shape = list(shape_of(values))
    if len(shape) <= missing or shape[: len(shape) - missing] == [1]:  # the same for every place
        return importer.emit(R.where(wide, importer.value(values), whole))
    if missing:
        raise NotImplementedError("rows that a mask selects, written with values of their own")
    return _take_in_order(importer, whole, importer.value(mask), importer.value(values))


def _take_in_order(importer: Importer, x: Any, mask: Any, values: Any) -> Any:
    """The elements under the mask are the values, one after the other."""
    flat = importer.emit(R.reshape(mask, [-1]))
    number = importer.emit(R.cumsum(R.astype(flat, "int64"), 0))

    def take(x: te.Tensor, mask: te.Tensor, number: te.Tensor, values: te.Tensor) -> te.Tensor:
        def one(*p: Any) -> Any:
            at: Any = tirx.const(0, "int64")
            for i, size in zip(p, x.shape):
                at = at * size + i
            index = te.min(te.max(number[at] - 1, tirx.const(0, "int64")), values.shape[0] - 1)
            return tirx.Select(mask[p], values[index], x[p])

        return te.compute(x.shape, one, name="taken")

    return importer.emit_te("masked_scatter", take, x, mask, number, values)


# ---------------------------------------------------------------------- along a dimension


def _larger(a: Any, b: Any) -> Any:
    """Return the larger value; a NaN wins, as in torch."""
    return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)


def _smaller(a: Any, b: Any) -> Any:
    return tirx.Select(tirx.any(a < b, tirx.isnan(a)), a, b)


def _added(a: Any, b: Any) -> Any:
    return a + b


def _multiplied(a: Any, b: Any) -> Any:
    return a * b


#: How two values are joined, and what joins with every value to that value, by dtype.
JOINED: dict[str, tuple[Callable[[Any, Any], Any], Callable[[str], Any]]] = {
    "sum": (_added, lambda dtype: tirx.const(0, dtype)),
    "mean": (_added, lambda dtype: tirx.const(0, dtype)),
    "prod": (_multiplied, lambda dtype: tirx.const(1, dtype)),
    "amax": (_larger, partial(limit, largest=True)),
    "amin": (_smaller, partial(limit, largest=False)),
}


def _reduced(importer: Importer, node: fx.Node, how: str, include_self: bool) -> Any:
    """Combine x[p] with all src[q] for which p is q but for the dimension, and index[q] is p there."""
    x, dim, index, source = node.args[:4]
    rank = len(shape_of(x))
    if not rank:
        raise NotImplementedError("a tensor without dimensions")
    dim, dtype = dim % rank, result_dtype(node)
    join, start = JOINED[how]
    if importer.machine is not None:
        written, values = list(shape_of(index)), importer.value(source)
        if list(shape_of(source)) != written:
            ends = [importer.sizes.expression(d) for d in written]
            values = importer.emit(R.strided_slice(values, [*range(rank)], [0] * rank, ends))
        fresh = None if include_self else start(dtype)
        scatter = Scatter(shape_of(x), written, dim, False, join, fresh, how == "mean")
        return emit_scatter(importer, scatter, importer.value(x), importer.value(index), values)
    fold = te.comm_reducer(join, start, name=how)
    limits = [d for d in range(rank) if d != dim and shape_of(index)[d] != shape_of(x)[d]]

    def hit(index: te.Tensor, p: Sequence[Any], q: Sequence[Any]) -> Any:
        return tirx.all(tirx.Cast("int64", index[tuple(q)]) == p[dim], *(p[d] < index.shape[d] for d in limits))

    def at(index: te.Tensor, p: Sequence[Any], j: Any) -> list[Any]:
        return [j if d == dim else te.min(p[d], index.shape[d] - 1) if d in limits else p[d] for d in range(rank)]

    def folded(index: te.Tensor, source: te.Tensor, shape: Any) -> te.Tensor:
        j = te.reduce_axis((tirx.const(0, "int64"), index.shape[dim]), name="j")

        def one(*p: Any) -> Any:
            q = at(index, p, j)
            return fold(tirx.Select(hit(index, p, q), source[tuple(q)], start(dtype)), axis=j)

        return te.compute(shape, one, name="folded")

    def writers(index: te.Tensor, shape: Any) -> te.Tensor:
        j = te.reduce_axis((tirx.const(0, "int64"), index.shape[dim]), name="j")

        def one(*p: Any) -> Any:
            return te.sum(tirx.Cast(dtype, hit(index, p, at(index, p, j))), axis=j)

        return te.compute(shape, one, name="writers")

    def combine(x: te.Tensor, index: te.Tensor, source: te.Tensor) -> te.Tensor:
        joined = folded(index, source, x.shape)
        count = None if include_self and how != "mean" else writers(index, x.shape)

        def one(*p: Any) -> Any:
            value, others = x(*p), joined(*p)
            total = join(value, others) if include_self else others
            if count is None:
                return total
            if how == "mean":
                members = count[p] + tirx.const(1 if include_self else 0, dtype)
                divide = te.div if dtype.startswith(("float", "bfloat")) else te.floordiv  # torch rounds down
                total = divide(total, te.max(members, tirx.const(1, dtype)))
            return total if include_self else tirx.Select(count[p] > tirx.const(0, dtype), total, value)

        return te.compute(x.shape, one, name="combined")

    return importer.emit_te(f"scatter_{how}", combine, *map(importer.value, (x, index, source)))
