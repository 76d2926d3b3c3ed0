"""Convolutions and transposed convolutions by TVM's operators, where no kernel of ours fits."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from tvm import te, topi

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    accumulator,
    add_bias,
    aten,
    cast,
    ops,
    pad,
    result_dtype,
    semantics,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.ir.nodes import shape_of


@semantics(ops.conv_transpose2d_nhwc.default, ops.conv_transpose3d_ndhwc.default)
def conv_transpose(importer: Importer, node: fx.Node) -> Any:
    """Compute a transposed convolution as a convolution over the image with zeros between its pixels (weights flipped)."""
    x, weight, bias, stride, padding, extra, groups, dilation = node.args
    array = importer.array(weight)
    inputs, per_out, *taps = array.shape
    rank, width = len(taps), inputs // groups
    flipped = np.flip(array.reshape(groups, width, per_out, *taps), axis=tuple(range(3, 3 + rank)))
    before = [dilation[d] * (k - 1) - padding[d] for d, k in enumerate(taps)]
    after = [b + extra[d] for d, b in enumerate(before)]

    def spread(t: te.Tensor) -> te.Tensor:
        wide = topi.nn.dilate(t, (1, *stride, 1))
        wide = pad(wide, (0, *(max(b, 0) for b in before), 0), (0, *(max(a, 0) for a in after), 0), 0)
        if min(before + after) >= 0:
            return wide
        shape = [int(d) for d in wide.shape]
        begin = [0, *(max(-b, 0) for b in before), 0]
        end = [shape[0], *(size - max(-a, 0) for size, a in zip(shape[1:], after)), shape[-1]]
        return topi.strided_slice(wide, begin, end)

    image = importer.emit_te("spread", spread, importer.value(x))
    parts = []
    for group in range(groups):
        kernel = np.ascontiguousarray(flipped[group].swapaxes(0, 1))
        section = importer.emit(R.strided_slice(image, [rank + 1], [group * width], [(group + 1) * width]))
        w = importer.weight(np.ascontiguousarray(np.moveaxis(kernel, 1, -1)), (weight, group))
        parts.append(importer.emit(_stock(rank)(section, w, dilation=dilation, **_layouts(rank))))
    value = parts[0] if len(parts) == 1 else importer.emit(R.concat(parts, rank + 1))
    return add_bias(importer, value, bias)


def _stock(rank: int) -> Any:
    """Return TVM's convolution of ``rank`` spatial dimensions."""
    return {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[rank]


def _layouts(rank: int) -> dict[str, str]:
    """Return the layouts of channels-last images and weights."""
    return {2: {"data_layout": "NHWC", "kernel_layout": "OHWI"}, 3: {"data_layout": "NDHWC", "kernel_layout": "ODHWI"}}[
        rank
    ]


@semantics(ops.conv2d_nhwc.default, ops.conv3d_ndhwc.default)
def conv_last(importer: Importer, node: fx.Node) -> Any:
    """Compute a channels-last convolution by TVM's, on targets without a kernel of ours; half types are summed in float32."""
    x, weight, bias, stride, padding, dilation, groups = node.args
    rank = len(stride)
    w = importer.weight(np.ascontiguousarray(np.moveaxis(importer.array(weight), 1, -1)), (weight, "channels last"))
    call = _stock(rank)(
        importer.value(x), w, stride, padding, dilation, groups, **_layouts(rank), out_dtype=accumulator(node)
    )
    return add_bias(importer, cast(importer, importer.emit(call), result_dtype(node)), bias)


@semantics(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(importer: Importer, node: fx.Node) -> Any:
    """Compute a convolution with channels first by TVM's, with the dtype of torch's result; half types are summed in float32."""
    x, weight, bias, stride, padding, dilation, groups = arguments_of(node)
    rank = len(stride)
    value = _stock(rank)(
        importer.value(x), importer.value(weight), stride, padding, dilation, groups, out_dtype=accumulator(node)
    )
    value = cast(importer, importer.emit(value), result_dtype(node))
    if bias is None:
        return value
    return importer.emit(R.add(value, importer.emit(R.reshape(importer.value(bias), [1, -1] + [1] * rank))))


def arguments_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, list[int], list[int], list[int], int]:
    """Return x, weight, bias, and for each axis the stride, the padding and the dilation, and the groups."""
    rank, defaults = len(shape_of(node)) - 2, ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    stride, padding, dilation = (
        [v] * rank if isinstance(v := argument(node, i, k, d), int) else list(v) for i, k, d in defaults
    )
    return *node.args[:2], argument(node, 2, "bias"), stride, padding, dilation, argument(node, 6, "groups", 1)
