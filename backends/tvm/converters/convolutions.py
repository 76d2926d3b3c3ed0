"""Convolutions and transposed convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import te, topi

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    accumulator,
    add_bias,
    aten,
    cast,
    cpu_kernel,
    fits_kernels,
    ops,
    pad,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import depthwise, gemm
from thresher.program import shape_of


def _padded(importer: Importer, x: Any, padding: list[int]) -> Any:
    """[B, H, W, C] with zeros around the image."""
    if not any(padding):
        return x
    return importer.emit_te(
        "pad", lambda t: pad(t, (0, padding[0], padding[1], 0), (0, padding[0], padding[1], 0), 0), x
    )


@cpu_kernel(ops.conv2d_nhwc.default)
def conv2d_kernel(importer: Importer, node: fx.Node) -> Any:
    """Channels-last convolution: depthwise by its own kernel, else as a packed product per group."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    array, (batch, out_h, out_w, outputs) = importer.array(weight), sizes(node)
    image = _padded(importer, importer.value(x), padding)
    if groups == shape_of(x)[3] and array.shape[1] == 1 and outputs == groups:
        w = importer.weight(np.ascontiguousarray(array[:, 0].transpose(1, 2, 0)), (weight, "depthwise"))

        def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
            return depthwise.convolution(image, w, (out_h, out_w), stride, dilation)

        return add_bias(importer, importer.emit_te("depthwise", compute, image, w), bias)
    parts = []
    per_in, per_out = array.shape[1], outputs // groups
    for group in range(groups):
        rows_of_group = array[group * per_out : (group + 1) * per_out]
        parts.append(
            _conv_group(
                importer, image, rows_of_group, (weight, group), group * per_in, (batch, out_h, out_w), stride, dilation
            )
        )
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, 3))
    return add_bias(importer, value, bias)


def _conv_group(
    importer: Importer,
    image: Any,
    array: np.ndarray,
    key: Any,
    first: int,
    out: Sequence[int],
    stride: Any,
    dilation: Any,
) -> Any:
    outputs, inputs, kh, kw = array.shape
    tile = gemm.choose_tile(math.prod(out), outputs, inputs * kh * kw, importer.cpu)
    packed = importer.weight(gemm.pack(np.ascontiguousarray(array.transpose(0, 2, 3, 1)), tile), (key, tile))

    def compute(image: te.Tensor, w: te.Tensor) -> te.Tensor:
        def read(m: Any, i: Any, j: Any, c: Any) -> Any:
            b, y, z = gemm.unravel(m, out)
            return image[b, y * stride[0] + i * dilation[0], z * stride[1] + j * dilation[1], first + c if first else c]

        return gemm.product(read, w, (kh, kw, inputs), out, outputs, tile)

    return importer.emit_te("conv2d", compute, image, packed)


@semantics(ops.conv_transpose2d_nhwc.default)
def conv_transpose2d(importer: Importer, node: fx.Node) -> Any:
    """As a convolution over the image with zeros between its pixels (weights flipped)."""
    x, weight, bias, stride, padding, extra, groups, dilation = node.args
    array = importer.array(weight)
    inputs, per_out, kh, kw = array.shape
    flipped = array.reshape(groups, inputs // groups, per_out, kh, kw)[..., ::-1, ::-1]
    before = [dilation[d] * (k - 1) - padding[d] for d, k in enumerate((kh, kw))]
    after = [b + extra[d] for d, b in enumerate(before)]

    def spread(t: te.Tensor) -> te.Tensor:
        wide = topi.nn.dilate(t, (1, stride[0], stride[1], 1))
        low, high = [max(b, 0) for b in before], [max(a, 0) for a in after]
        wide = pad(wide, (0, *low, 0), (0, *high, 0), 0)
        if min(before + after) >= 0:
            return wide
        h, w = (int(wide.shape[d + 1]) for d in (0, 1))
        begin = [0, max(-before[0], 0), max(-before[1], 0), 0]
        end = [int(wide.shape[0]), h - max(-after[0], 0), w - max(-after[1], 0), int(wide.shape[3])]
        return topi.strided_slice(wide, begin, end)

    image = importer.emit_te("spread", spread, importer.value(x))
    parts = []
    for group in range(groups):
        kernel = np.ascontiguousarray(flipped[group].transpose(1, 0, 2, 3))
        if importer.machine is not None and fits_kernels(node):
            parts.append(
                _conv_group(
                    importer,
                    image,
                    kernel,
                    (weight, group),
                    group * inputs // groups,
                    tuple(sizes(node)[:3]),
                    (1, 1),
                    dilation,
                )
            )
        else:
            width = inputs // groups
            part = importer.emit(R.strided_slice(image, [3], [group * width], [(group + 1) * width]))
            w = importer.weight(np.ascontiguousarray(kernel.transpose(0, 2, 3, 1)), (weight, group))
            parts.append(
                importer.emit(R.nn.conv2d(part, w, dilation=dilation, data_layout="NHWC", kernel_layout="OHWI"))
            )
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, 3))
    return add_bias(importer, value, bias)


@semantics(ops.conv2d_nhwc.default)
def conv2d_nhwc(importer: Importer, node: fx.Node) -> Any:
    x, weight, bias, stride, padding, dilation, groups = node.args
    w = importer.emit(R.permute_dims(importer.value(weight), [0, 2, 3, 1]))
    value = R.nn.conv2d(
        importer.value(x), w, stride, padding, dilation, groups, "NHWC", "OHWI", out_dtype=accumulator(node)
    )
    return add_bias(importer, cast(importer, importer.emit(value), result_dtype(node)), bias)


@semantics(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(importer: Importer, node: fx.Node) -> Any:
    rank = len(shape_of(node)) - 2
    call = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[rank]
    defaults = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    stride, padding, dilation = (
        [v] * rank if isinstance(v := argument(node, i, k, d), int) else list(v) for i, k, d in defaults
    )
    value = call(
        importer.value(node.args[0]),
        importer.value(node.args[1]),
        stride,
        padding,
        dilation,
        argument(node, 6, "groups", 1),
        out_dtype=accumulator(node),
    )
    value = cast(importer, importer.emit(value), result_dtype(node))
    bias = argument(node, 2, "bias")
    if bias is None:
        return value
    return importer.emit(R.add(value, importer.emit(R.reshape(importer.value(bias), [1, -1] + [1] * rank))))
