"""Reductions and running sums."""

from __future__ import annotations

from typing import Any

from torch import fx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    aten,
    cast,
    result_dtype,
    semantics,
)
from thresher.backends.tvm.importing.importer import Importer


@semantics(aten.amax.default, aten.amin.default)
def extremum(importer: Importer, node: fx.Node) -> Any:
    """Compute maxima or minima over dimensions, all of them where none is named."""
    dims, keepdim = argument(node, 1, "dim", []), bool(argument(node, 2, "keepdim", False))
    operation = R.max if node.target is aten.amax.default else R.min
    return importer.emit(operation(importer.value(node.args[0]), list(dims) or None, keepdim))


@semantics(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
def total(importer: Importer, node: fx.Node) -> Any:
    """Compute sums or means over dimensions; half types are summed in float32."""
    dims = argument(node, 1, "dim") if node.target in (aten.mean.dim, aten.sum.dim_IntList) else None
    keepdim = bool(argument(node, 2, "keepdim", False)) if dims is not None or len(node.args) > 2 else False
    dtype = result_dtype(node)
    value = cast(importer, importer.value(node.args[0]), dtype)
    dims = [dims] if isinstance(dims, int) else (list(dims) if dims else None)
    wide = cast(importer, value, "float32") if dtype in ("float16", "bfloat16") else value
    operation = R.mean if "mean" in str(node.target) else R.sum
    return cast(importer, importer.emit(operation(wide, dims, keepdim)), dtype)


@semantics(aten.cumsum.default)
def cumsum(importer: Importer, node: fx.Node) -> Any:
    """Compute running sums in the dtype of the result."""
    dtype = result_dtype(node)
    return importer.emit(R.cumsum(cast(importer, importer.value(node.args[0]), dtype), node.args[1], dtype))


@semantics(aten.min.dim, aten.max.dim)
def extremum_with_index(importer: Importer, node: fx.Node) -> Any:
    """Return (values, indices) of the extrema along a dimension; of equal ones the first."""
    x, dim, keepdim = importer.value(node.args[0]), node.args[1], bool(argument(node, 2, "keepdim", False))
    value, position = (R.min, R.argmin) if node.target is aten.min.dim else (R.max, R.argmax)
    return importer.emit(value(x, [dim], keepdim)), importer.emit(position(x, dim, keepdim))


@semantics(aten.prod.dim_int)
def product_over(importer: Importer, node: fx.Node) -> Any:
    """Compute products over one dimension in the dtype of the result."""
    value = cast(importer, importer.value(node.args[0]), result_dtype(node))
    return importer.emit(R.prod(value, [node.args[1]], bool(argument(node, 2, "keepdim", False))))
