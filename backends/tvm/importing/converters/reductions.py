"""Reductions and running sums."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    aten,
    cast,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.converters.writes import emit_scatter
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu.scatter import Scatter
from thresher.ir.nodes import shape_of


@semantics(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
def total(importer: Importer, node: fx.Node) -> Any:
    """Compute sums or means over dimensions; half types are summed in float32."""
    dims = argument(node, 1, "dim") if node.target in (aten.mean.dim, aten.sum.dim_IntList) else None
    keepdim = bool(argument(node, 2, "keepdim", False)) if dims is not None or len(node.args) > 2 else False
    dtype = result_dtype(node)
    value = cast(importer, importer.value(node.args[0]), dtype)
    dims = [dims] if isinstance(dims, int) else (list(dims) if dims else None)
    if not shape_of(node.args[0]):
        return value  # of one number
    wide = cast(importer, value, "float32") if dtype in ("float16", "bfloat16") else value
    operation = R.mean if "mean" in str(node.target) else R.sum
    return cast(importer, importer.emit(operation(wide, dims, keepdim)), dtype)


@semantics(aten.cumsum.default)
def cumsum(importer: Importer, node: fx.Node) -> Any:
    """Compute running sums in the dtype of the result."""
    dtype = result_dtype(node)
    return importer.emit(R.cumsum(cast(importer, importer.value(node.args[0]), dtype), node.args[1], dtype))


@semantics(aten.prod.dim_int)
def product_over(importer: Importer, node: fx.Node) -> Any:
    """Compute products over one dimension in the dtype of the result."""
    value = cast(importer, importer.value(node.args[0]), result_dtype(node))
    return importer.emit(R.prod(value, [node.args[1]], bool(argument(node, 2, "keepdim", False))))


@semantics(aten.histc.default)
def histc(importer: Importer, node: fx.Node) -> Any:
    """Count the elements of each of ``bins`` equal intervals from ``min`` to ``max``; what lies outside counts nowhere."""
    bins, low, high = argument(node, 1, "bins", 100), argument(node, 2, "min", 0), argument(node, 3, "max", 0)
    if low >= high:
        raise NotImplementedError("intervals from the least to the largest element: give min and max, min below max")
    dtype, shape = result_dtype(node), sizes(node.args[0])
    first, last = tirx.const(float(low), dtype), tirx.const(float(high), dtype)

    def interval(value: Any) -> Any:
        """Return the number of the value's interval, ``bins`` where it has none."""
        at = te.min(tirx.Cast("int64", (value - first) * tirx.const(float(bins), dtype) / (last - first)), bins - 1)
        return tirx.Select(tirx.all(value >= first, value <= last), at, tirx.const(bins, "int64"))

    def counted(x: te.Tensor) -> te.Tensor:
        axes = [
            te.reduce_axis((tirx.const(0, "int64"), tirx.const(size, "int64")), name=f"i{d}")
            for d, size in enumerate(shape)
        ]

        def count(number: Any) -> Any:
            hit = interval(x[tuple(axes)]) == number
            return te.sum(tirx.Select(hit, tirx.const(1.0, dtype), tirx.const(0.0, dtype)), axis=axes)

        return te.compute((bins,), count, name="histc")

    if importer.machine is None:
        return importer.emit_te("histc", counted, importer.value(node.args[0]))
    flat = importer.emit(R.reshape(importer.value(node.args[0]), [-1]))
    index = importer.emit_te("interval", lambda x: te.compute(x.shape, lambda i: interval(x[i]), name="interval"), flat)
    scatter = Scatter([bins], [math.prod(shape)], 0, True, operator.add)
    zeros, ones = (importer.emit(R.full([n], relax.const(v, dtype))) for n, v in ((bins, 0.0), (math.prod(shape), 1.0)))
    return emit_scatter(importer, scatter, zeros, index, ones)
