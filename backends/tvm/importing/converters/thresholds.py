"""Thresholds (``thresher::shrink``): comparisons and selections, one element at a time, so that they fuse into what comes before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import R, cast, cpu_kernel, ops, result_dtype, semantics, sizes
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.backends.tvm.kernels.cpu import kth_largest as kth
from thresher.ir.nodes import shape_of

#: (size, t, kept, zero) -> the element, by ``keep``. The comparison stays as it is: its opposite is another one for NaN.
KEPT: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "nle": lambda size, t, kept, zero: tirx.Select(size <= t, zero, kept),
    "nlt": lambda size, t, kept, zero: tirx.Select(size < t, zero, kept),
    "gt": lambda size, t, kept, zero: tirx.Select(size > t, kept, zero),
    "ge": lambda size, t, kept, zero: tirx.Select(size >= t, kept, zero),
    "xgt": lambda size, t, kept, zero: kept * tirx.Select(size > t, zero + 1, zero),
    "xge": lambda size, t, kept, zero: kept * tirx.Select(size >= t, zero + 1, zero),
}


def element(kind: str, keep: str, dtype: str, x: Any, t: Any, t2: Any) -> Any:
    """Return the threshold of one element; NaN passes where torch lets it pass."""
    zero, one = (tirx.const(v, dtype) for v in (0.0, 1.0))
    if kind == "soft":
        return x - tirx.Select(x > t, t, tirx.Select(x < -t, -t, x))
    if kind == "positive":
        above = x - t
        return tirx.Select(above < zero, zero, above)
    size = te.abs(x) if kind != "above" else x
    if kind in ("hard", "above"):
        return KEPT[keep](size, t, x, zero)
    if kind == "garrote":
        return KEPT[keep](size, t, x - t * t / tirx.Select(size > t, x, one), zero)
    sign = tirx.Select(x < zero, -one, one)
    between = sign * t2 * (size - t) / (t2 - t)
    return tirx.Select(size <= t, zero, tirx.Select(size <= t2, between, x))


@semantics(ops.shrink.default)
def shrink(importer: Importer, node: fx.Node) -> Any:
    """Apply ``thresher::shrink``; a threshold that is one constant number is part of the code."""
    x, t, kind = node.args[:3]
    keep, t2 = argument(node, 3, "keep", "nle"), argument(node, 4, "t2")
    dtype = result_dtype(node)
    source = importer.value(x)
    if shape_of(x) != shape_of(node):
        source = importer.emit(R.broadcast_to(source, sizes(node)))
    operands = [source]
    constants: list[Any] = []
    for value in (t, t2):
        number = None if value is None else _number(importer, value)
        constants.append(number)
        if value is not None and number is None:
            operands.append(cast(importer, importer.value(value), dtype))

    def compute(*tensors: te.Tensor) -> te.Tensor:
        def one(*i: Any) -> Any:
            others = iter(tensors[1:])
            limits = [
                tirx.const(c, dtype) if c is not None else _at(next(others), i) if v is not None else None
                for v, c in zip((t, t2), constants)
            ]
            value = _at(tensors[0], i)
            return elementwise.named(value, lambda y: element(kind, keep, str(y.ty.dtype), y, *_in_dtype(limits, y)))

        return te.compute(tensors[0].shape, one, name="T_shrink")

    return importer.emit_te("shrink", compute, *operands)


def _number(importer: Importer, node: fx.Node) -> float | None:
    """Return the value of a threshold that is one constant number, else None."""
    if not importer.is_constant(node) or node.meta["val"].numel() != 1:
        return None
    return float(importer.array(node).reshape(()))


def _at(x: te.Tensor, index: Any) -> Any:
    """Return the element at an index of a value that is broadcast to the result."""
    indices = index[len(index) - len(x.shape) :]
    return x(
        *(tirx.const(0, "int64") if isinstance(d, tirx.IntImm) and int(d) == 1 else i for i, d in zip(indices, x.shape))
    )


@semantics(ops.group_shrink.default)
def group_shrink(importer: Importer, node: fx.Node) -> Any:
    """Shrink groups by their norms along the last dimension, which are a kernel of their own."""
    x, t, dtype = importer.value(node.args[0]), importer.value(node.args[1]), result_dtype(node)
    emit = importer.emit
    size = emit(R.sqrt(emit(R.sum(emit(R.multiply(x, x)), -1, keepdims=True))))

    def compute(x: te.Tensor, size: te.Tensor, t: te.Tensor) -> te.Tensor:
        zero, one = (tirx.const(v, dtype) for v in (0.0, 1.0))

        def element(*i: Any) -> Any:
            norm = _at(size, i)
            gain = one - _at(t, i) / tirx.Select(norm == zero, one, norm)
            gain = tirx.Select(gain < zero, zero, gain)
            return tirx.Select(norm == zero, zero, x(*i) * gain)

        return te.compute(x.shape, element, name="T_group_shrink")

    return importer.emit_te("group_shrink", compute, x, size, t)


@semantics(ops.kth_largest.default)
def kth_largest(importer: Importer, node: fx.Node) -> Any:
    """Return the last of the k largest, by TVM's top-k."""
    x, k = importer.value(node.args[0]), node.args[1]
    largest = importer.emit(R.topk(x, k, -1, "values", True))
    return importer.emit(R.strided_slice(largest, [-1], [k - 1], [k]))


@cpu_kernel(ops.kth_largest.default)
def kth_largest_kernel(importer: Importer, node: fx.Node) -> Any:
    """Return the k-th largest of every row by a radix selection on the bits."""
    *lead, size = sizes(node.args[0])
    rows = math.prod(lead)
    function = kth.kernel(rows, size, importer.cpu.lanes)
    x = importer.emit(R.reshape(importer.value(node.args[0]), [rows, size]))
    k = relax.const(np.array([node.args[1]], np.int32))
    target = importer.builder.add_func(function, "kth_largest")
    out = importer.emit(relax.call_tir(target, [x, k], relax.TensorType([rows], "float32")))
    return importer.emit(R.reshape(out, [*lead, 1]))


def _in_dtype(values: Sequence[Any], like: Any) -> list[Any]:
    """Return values, or None, in the dtype of another one."""
    return [v if v is None or v.ty.dtype == like.ty.dtype else tirx.Cast(like.ty.dtype, v) for v in values]
