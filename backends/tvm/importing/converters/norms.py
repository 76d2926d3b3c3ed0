"""Softmax and the norms."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    accumulator,
    aten,
    cast,
    cpu_kernel,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import rows
from thresher.ir.nodes import dtype_of, shape_of
from thresher.runtime.tensor_spec import dtype_name


@cpu_kernel(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute softmax or log_softmax over one dimension; where it is not the last one, between two transpositions."""
    x, dim = node.args[0], node.args[1] % len(shape_of(node))
    log, rank = "log" in str(node.target), len(shape_of(node))
    value = cast(importer, importer.value(x), "float32")
    order = [d for d in range(rank) if d != dim] + [dim]
    if dim != rank - 1:
        value = importer.emit(R.permute_dims(value, order))
    value = importer.emit_te("softmax", lambda t: rows.softmax(t, log), value)
    return value if dim == rank - 1 else importer.emit(R.permute_dims(value, [order.index(d) for d in range(rank)]))


@cpu_kernel(aten.layer_norm.default, aten.rms_norm.default)
def norm_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute layer_norm or rms_norm over the last dimensions, which are merged into one."""
    centred = node.target is aten.layer_norm.default
    x, shape, weight = node.args[0], list(node.args[1]), argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if centred else None
    epsilon = argument(node, 4, "eps", 1e-5) if centred else argument(node, 3, "eps")
    size, whole = math.prod(shape), sizes(node)
    value, w, b = (None if n is None else importer.value(n) for n in (x, weight, bias))
    if len(shape) > 1:
        value = importer.emit(R.reshape(value, (*whole[: -len(shape)], size)))
        w, b = (None if t is None else importer.emit(R.reshape(t, (size,))) for t in (w, b))
    value = importer.emit_te("norm", lambda x, w, b: rows.norm(x, w, b, epsilon, centred), value, w, b)
    return importer.emit(R.reshape(value, whole)) if len(shape) > 1 else value


@cpu_kernel(ops.layer_norm.default)
def layer_norm_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute ``thresher::layer_norm``: channels that are constant were removed, and their sums are added to the statistics."""
    x, weight, bias, epsilon, *gone = node.args
    value, w, b = (None if n is None else importer.value(n) for n in (x, weight, bias))
    return importer.emit_te("norm", lambda x, w, b: rows.norm(x, w, b, epsilon, True, tuple(gone)), value, w, b)


@semantics(ops.layer_norm.default)
def layer_norm(importer: Importer, node: fx.Node) -> Any:
    """Compute ``thresher::layer_norm`` from TVM's operators: the statistics of all ``count`` channels, of which some are not in x."""
    x, weight, bias, epsilon, count, total, square = node.args
    value, missing = importer.value(x), count - sizes(node, -1)[0]
    number = partial(_number, node)
    sums = importer.emit(R.sum(value, [-1], keepdims=True))
    mean = importer.emit(R.multiply(R.add(sums, number(total)), number(1 / count)))
    centred = importer.emit(R.subtract(value, mean))
    rest = R.add(number(square), R.multiply(mean, R.add(number(-2 * total), R.multiply(mean, number(missing)))))
    squares = R.add(R.sum(R.multiply(centred, centred), [-1], keepdims=True), rest)
    scale = importer.emit(R.rsqrt(R.add(R.multiply(squares, number(1 / count)), number(epsilon))))
    return _affine(importer, R.multiply(centred, scale), weight, bias, sizes(node, -1))


@semantics(ops.group_norm.default)
def partial_group_norm(importer: Importer, node: fx.Node) -> Any:
    """Compute ``thresher::group_norm``: the statistics of a group are those of its channels, added up by a product with a 0/1 matrix."""
    x, widths, weight, bias, epsilon, count, totals, squares = node.args
    value, number, rank = importer.value(x), partial(_number, node), len(shape_of(node))
    group, dtype = np.repeat(np.arange(len(widths)), widths), np.dtype(result_dtype(node))
    together, pixels = relax.const((group[:, None] == group[None, :]).astype(dtype)), math.prod(sizes(node, 2))
    spatial = list(range(2, rank))
    elements = count * pixels

    def constant(values: Any) -> Any:
        return relax.const(np.asarray(values, dtype)[group][None])

    def over_group(v: Any) -> Any:
        return R.matmul(R.sum(v, spatial) if spatial else v, together)

    def spread(v: Any) -> Any:
        return R.expand_dims(v, spatial) if spatial else v

    sums = R.add(over_group(value), constant([t * pixels for t in totals]))
    mean = importer.emit(R.multiply(sums, number(1 / elements)))
    centred = importer.emit(R.subtract(value, spread(mean)))
    slope = R.add(constant([-2 * t for t in totals]), R.multiply(mean, constant([count - w for w in widths])))
    rest = R.multiply(R.add(constant(squares), R.multiply(mean, slope)), number(pixels))
    variance = R.multiply(R.add(over_group(R.multiply(centred, centred)), rest), number(1 / elements))
    scale = importer.emit(R.rsqrt(R.add(variance, number(epsilon))))
    return _affine(importer, R.multiply(centred, spread(scale)), weight, bias, [len(group)] + [1] * len(spatial))


def _number(node: fx.Node, value: float) -> Any:
    return relax.const(value, result_dtype(node))


def _affine(importer: Importer, value: Any, weight: Any, bias: Any, shape: list[int]) -> Any:
    """Return ``value * weight + bias``, the two in ``shape``."""
    for operator, n in ((R.multiply, weight), (R.add, bias)):
        value = value if n is None else operator(value, R.reshape(importer.value(n), shape))
    return importer.emit(value)


@semantics(aten.group_norm.default)
def group_norm(importer: Importer, node: fx.Node) -> Any:
    """Compute group_norm by TVM's, with ones and zeros for a missing weight and bias."""
    x, groups, channels = node.args[0], node.args[1], sizes(node, 1)[0]
    weight, bias, epsilon = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    dtype = np.dtype(result_dtype(node))
    w = (
        importer.weight(np.ones(channels, dtype), ("ones", channels, dtype))
        if weight is None
        else importer.value(weight)
    )
    b = importer.weight(np.zeros(channels, dtype), ("zeros", channels, dtype)) if bias is None else importer.value(bias)
    return importer.emit(
        R.nn.group_norm(importer.value(x), w, b, groups, 1, list(range(2, len(shape_of(node)))), epsilon)
    )


@semantics(aten.layer_norm.default)
def whole_layer_norm(importer: Importer, node: fx.Node) -> Any:
    """Compute layer_norm by TVM's; half types are normalised in float32."""
    x, shape, weight, bias = node.args[0], list(node.args[1]), argument(node, 2, "weight"), argument(node, 3, "bias")
    wide = accumulator(node)

    def parameter(value: Any, fill: float) -> Any:
        if value is None:
            return importer.weight(np.full(shape, fill, wide), ("filled", tuple(shape), fill, wide))
        return cast(importer, importer.value(value), wide)

    value = cast(importer, importer.value(x), wide)
    axes, epsilon = list(range(-len(shape), 0)), argument(node, 4, "eps", 1e-5)
    value = importer.emit(R.nn.layer_norm(value, parameter(weight, 1.0), parameter(bias, 0.0), axes, epsilon))
    return cast(importer, value, result_dtype(node))


@semantics(aten.rms_norm.default)
def rms_norm(importer: Importer, node: fx.Node) -> Any:
    """Compute rms_norm by TVM's, with ones for a missing weight."""
    x, axes, weight, epsilon = node.args[0], len(node.args[1]), argument(node, 2, "weight"), argument(node, 3, "eps")
    dtype = dtype_of(node)
    w = (
        importer.weight(np.ones(sizes(node, len(shape_of(node)) - axes), dtype_name(dtype)), ("ones", node))
        if weight is None
        else importer.value(weight)
    )
    return importer.emit(R.nn.rms_norm(importer.value(x), w, list(range(-axes, 0)), epsilon))
