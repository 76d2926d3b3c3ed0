"""Running extrema, products and sums of exponentials along a dimension, and searches in sorted rows: loops over rows, on the CPU.

For a GPU, where rows must not be loops of one thread, torch's kernels are called instead.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import R, aten, cast, result_dtype, semantics, sizes
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import scans
from thresher.ir.nodes import dtype_of, shape_of


def _rows(importer: Importer, node: fx.Node, dim: int) -> tuple[Any, list[int], list[int]]:
    """Return a value with ``dim`` last, its shape, and the order of dimensions that puts it back."""
    if importer.machine is None:
        raise NotImplementedError("its loops are for the CPU")
    rank = len(shape_of(node))
    order = [*(d for d in range(rank) if d != dim % rank), dim % rank]
    moved = (
        importer.value(node)
        if order == list(range(rank))
        else importer.emit(R.permute_dims(importer.value(node), order))
    )
    return moved, [sizes(node)[d] for d in order], [order.index(d) for d in range(rank)]


def _scan(importer: Importer, node: fx.Node, operation: str, dim: int) -> Any:
    """Emit the scan along ``dim`` and return its results as they are declared: one, or values and indices."""
    x = node.args[0]
    if not shape_of(x):
        raise NotImplementedError("a tensor without dimensions")
    moved, shape, back = _rows(importer, x, dim)
    dtypes = scans.dtypes(operation, str(moved.ty.dtype))
    function = importer.builder.add_func(scans.scan(operation, shape, str(moved.ty.dtype)), operation)
    result = importer.emit(relax.call_tir(function, [moved], [relax.TensorType(shape, d) for d in dtypes]))
    parts = [importer.emit(relax.TupleGetItem(result, i)) for i in range(2)] if len(dtypes) == 2 else [result]
    if back != list(range(len(back))):
        parts = [importer.emit(R.permute_dims(p, back)) for p in parts]
    return parts if len(parts) == 2 else parts[0]


@semantics(aten.cummax.default, aten.cummin.default)
def running_extremum(importer: Importer, node: fx.Node) -> Any:
    """Return (values, indices); of equal values the last, NaN before all."""
    return _scan(importer, node, "cummax" if node.target is aten.cummax.default else "cummin", int(node.args[1]))


@semantics(aten.logcumsumexp.default)
def running_logsumexp(importer: Importer, node: fx.Node) -> Any:
    """Compute log(sum exp(x)) of the elements so far, relative to their maximum."""
    if result_dtype(node) not in ("float32", "float64"):
        raise NotImplementedError(f"sums in {result_dtype(node)}")
    return _scan(importer, node, "logcumsumexp", int(node.args[1]))


def _search(importer: Importer, node: fx.Node, row: fx.Node, values: Any, right: bool) -> Any:
    """Return the indices at which ``values`` would be inserted into the sorted rows of ``row``, by bisection."""
    if importer.machine is None:
        raise NotImplementedError("its loops are for the CPU")
    dtype = str(importer.value(row).ty.dtype)
    shape = sizes(node)
    function = importer.builder.add_func(
        scans.search(sizes(row), shape, dtype, result_dtype(node), right), "searchsorted"
    )
    kind = relax.TensorType(shape, result_dtype(node))
    return importer.emit(relax.call_tir(function, [importer.value(row), cast(importer, values, dtype)], kind))


@semantics(aten.searchsorted.Tensor)
def searchsorted(importer: Importer, node: fx.Node) -> Any:
    """Return the indices at which values would be inserted into sorted rows."""
    if node.kwargs.get("sorter") is not None or node.kwargs.get("side") not in (None, "left", "right"):
        raise NotImplementedError("a sorter")
    right = bool(argument(node, 3, "right", False)) or node.kwargs.get("side") == "right"
    row, values = node.args[:2]
    per_row = len(shape_of(row)) > 1
    if (per_row and shape_of(row)[:-1] != shape_of(values)[:-1]) or dtype_of(row) is not dtype_of(values):
        raise NotImplementedError("rows and values of different shapes or dtypes")
    return _search(importer, node, row, importer.value(values), right)


@semantics(aten.bucketize.Tensor)
def bucketize(importer: Importer, node: fx.Node) -> Any:
    """Return the number of boundaries below each value."""
    values, boundaries = node.args[:2]
    if dtype_of(values) is not dtype_of(boundaries):
        raise NotImplementedError("values and boundaries of different dtypes")
    return _search(importer, node, boundaries, importer.value(values), bool(argument(node, 3, "right", False)))
