"""Writes at indices on a CPU, in the order of the values; sizes may be free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx
from tvm import relax, te, tirx

from thresher.backends.tvm.importing.converters.registry import R
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.sizes import Sizes, symbols
from thresher.backends.tvm.kernels.cpu.scatter import Scatter
from thresher.ir.nodes import shape_of


def write_at_indices(importer: Importer, node: fx.Node, dims: list[int], indices: list[fx.Node], join: Any) -> Any:
    """Write the values of an ``index_put``: the dimensions that are indexed become one, what is written [before, count, after].

    ``indices``: of the dimensions ``dims`` of x, broadcast against each other. What they select stands in the place of the first where
    ``dims`` are neighbours, else in front.
    """
    x, values = node.args[0], node.args[2]
    sizes, count = list(shape_of(x)), list(torch.broadcast_shapes(*(shape_of(i) for i in indices)))
    order, first = list(range(len(sizes))), dims[0]
    if dims != list(range(first, first + len(dims))):
        first, order = 0, [*dims, *(d for d in order if d not in dims)]
    back = [order.index(d) for d in range(len(order))]
    before, after = ([sizes[d] for d in part] for part in (order[:first], order[first + len(dims) :]))
    indexed = [sizes[d] for d in dims]
    rows = [math.prod(before), math.prod(indexed), math.prod(after)]
    written = [rows[0], math.prod(count), rows[2]]

    flat = [_shaped(importer, _wide(importer, i, count), [written[1]]) for i in indices]
    if len(dims) > 1:
        flat = [importer.emit_te("row", partial(_row, sizes=[importer.sizes.expression(d) for d in indexed]), *flat)]
    wide = _shaped(importer, _wide(importer, values, [*before, *count, *after]), written)
    moved = _shaped(importer, _moved(importer, importer.value(x), order), rows)
    out = emit_scatter(importer, Scatter(rows, written, 1, True, join), moved, flat[0], wide)
    return _moved(importer, _shaped(importer, out, [sizes[d] for d in order]), back)


def emit_scatter(importer: Importer, scatter: Scatter, x: Any, index: Any, values: Any) -> Any:
    """Emit a scatter whose sizes are torch's. Raises NotImplementedError where one is not known before the kernel runs."""
    sizes = [*scatter.shape, *scatter.values]
    if any(map(importer.sizes.unknown, sizes)):
        raise NotImplementedError("a size that the values of tensors decide")
    inside, free = Sizes(), sorted(symbols(sizes), key=str)
    variables = [inside.define(symbol) for symbol in free]
    shape, written = ([inside.expression(d) for d in part] for part in (scatter.shape, scatter.values))
    here = replace(scatter, shape=shape, values=written)
    dtype = str(x.ty.dtype)
    function = importer.builder.add_func(here.kernel(dtype, str(index.ty.dtype), variables), "scatter")
    out = [importer.sizes.expression(d) for d in scatter.shape]
    kinds = [relax.TensorType(out, d) for d in (dtype, *(["int32"] if scatter.mean else []))]
    arguments = [x, index, values, *(importer.sizes.define(symbol) for symbol in free)]
    result = importer.emit(relax.call_tir(function, arguments, kinds if scatter.mean else kinds[0]))
    return importer.emit(relax.TupleGetItem(result, 0)) if scatter.mean else result


def _row(*indices: te.Tensor, sizes: Sequence[Any]) -> te.Tensor:
    """Return the numbers of the elements that the indices name; one outside of its dimension names none."""

    def one(j: Any) -> Any:
        row: Any = tirx.const(0, "int64")
        inside: list[Any] = []
        for tensor, size in zip(indices, sizes):
            index = tirx.Cast("int64", tensor[j])
            index = tirx.Select(index < 0, index + size, index)
            row, inside = row * size + index, [*inside, index >= 0, index < size]
        return tirx.Select(tirx.all(*inside), row, tirx.Cast("int64", math.prod(sizes)))

    return te.compute(indices[0].shape, one, name="row")


def _shaped(importer: Importer, value: Any, shape: Sequence[Any]) -> Any:
    return importer.emit(R.reshape(value, [importer.sizes.expression(d) for d in shape]))


def _wide(importer: Importer, node: fx.Node, shape: Sequence[Any]) -> Any:
    """Return a value broadcast to a shape; one that has it is not copied."""
    if list(shape_of(node)) == list(shape):
        return importer.value(node)
    return importer.emit(R.broadcast_to(importer.value(node), [importer.sizes.expression(d) for d in shape]))


def _moved(importer: Importer, value: Any, order: list[int]) -> Any:
    return value if order == sorted(order) else importer.emit(R.permute_dims(value, order))
