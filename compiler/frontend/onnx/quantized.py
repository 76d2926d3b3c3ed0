"""The quantised operators of ONNX, in numbers of the types that they name.

    quantised = saturate(round(x / scale) + zero point),   x = (quantised - zero point) * scale

Sums of products of whole numbers are exact, as the standard has them, and still computed by float32 kernels, which are fast: in parts so
short that no sum leaves the 2^24 whole numbers that float32 has, the parts added up in int32. The specification:
https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from thresher.frontend.onnx.casts import converted
from thresher.frontend.onnx.convolutions import conv
from thresher.frontend.onnx.dtypes import ELEM_TYPES, NARROW_RANGES, torch_dtype
from thresher.frontend.onnx.rules import Node, rule
from thresher.frontend.onnx.values import Unsupported

MAX_PRODUCTS = (1 << 24) // (255 * 255)  # products of 9-bit differences whose sum is a whole number in float32


@rule("QuantizeLinear", unsigned="native")
def quantize(
    node: Node,
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """Return x / scale rounded to the type of ``zero``, without one to that of the attribute, or to uint8."""
    to = (node.types[2] if len(node.types) > 2 else None) or output_dtype or TensorProto.UINT8
    exact = torch_dtype(precision) if precision else scale.dtype
    scaled = x.to(exact) / _along(scale.to(exact), x, axis, block_size)
    dtype = torch_dtype(to)
    if to == TensorProto.FLOAT4E2M1 or (dtype.is_floating_point and dtype.itemsize == 1):
        return converted(scaled, to, bool(saturate))  # their zero point is 0
    point = torch.zeros((), dtype=torch.int32) if zero is None else zero.to(torch.int32)
    return _saturated(scaled, _along(point, x, axis, block_size), to)


@rule("DequantizeLinear", unsigned="native")
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """Return (x - zero) * scale in the type of ``scale``, or in that of the attribute."""
    dtype = torch_dtype(output_dtype) if output_dtype else scale.dtype
    if x.dtype.is_floating_point:
        exact = x.to(torch.float32)
    elif zero is None:
        exact = x.to(torch.int32)
    else:
        exact = x.to(torch.int32) - _along(zero.to(torch.int32), x, axis, block_size)
    return (exact.to(scale.dtype) * _along(scale, x, axis, block_size)).to(dtype)


@rule("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor) -> Sequence[Tensor]:
    """Return x in uint8 by the range of its values, with its scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # as onnxruntime: the standard would divide by 0
    zero = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return _saturated(x / scale, zero, TensorProto.UINT8), scale, zero


@rule("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Return the product of two integer matrices in int32."""
    return _matmul(_difference(a, None if a_zero is None else _rows(a_zero)), _difference(b, b_zero))


@rule("QLinearMatMul")
def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    """Return the product of two quantised matrices, quantised."""
    total = _matmul(_difference(a, _rows(a_zero)), _difference(b, b_zero))
    scale = _rows(a_scale) * b_scale / y_scale
    return _saturated(total.to(scale.dtype) * scale, y_zero, ELEM_TYPES[y_zero.dtype])


@rule("ConvInteger")
def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str,
    dilations: Sequence[int] | None = None,
    group: int,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of integers in int32."""
    window = {
        "auto_pad": auto_pad,
        "dilations": dilations,
        "kernel_shape": kernel_shape,
        "pads": pads,
        "strides": strides,
    }
    zero = None if w_zero is None else _of_outputs(w_zero, w)
    return _conv(_difference(x, x_zero), _difference(w, zero), group, window)


@rule("QLinearConv")
def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str,
    dilations: Sequence[int] | None = None,
    group: int,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of quantised tensors, quantised."""
    window = {
        "auto_pad": auto_pad,
        "dilations": dilations,
        "kernel_shape": kernel_shape,
        "pads": pads,
        "strides": strides,
    }
    total = _conv(_difference(x, x_zero), _difference(w, _of_outputs(w_zero, w)), group, window)
    if bias is not None:
        total = total + bias.reshape(-1, *[1] * (total.dim() - 2))
    scale = w_scale * x_scale / y_scale
    scale = scale.reshape(-1, *[1] * (total.dim() - 2)) if scale.numel() > 1 else scale
    return _saturated(total.to(scale.dtype) * scale, y_zero, ELEM_TYPES[y_zero.dtype])


# ---------------------------------------------------------------------- numbers


def _saturated(x: Tensor, zero: Tensor, to: int) -> Tensor:
    """Return x rounded, half to even, plus ``zero``, within the limits of the integer type ``to``."""
    dtype = torch_dtype(to)
    low, high = NARROW_RANGES.get(to) or (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    rounded = torch.round(x)
    if rounded.element_size() == 2:  # whose whole numbers do not reach the limits of 16 bits
        rounded = rounded.to(torch.float32)
    return torch.clamp(rounded + zero.to(rounded.dtype), low, high).to(dtype)


def _along(value: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Return ``value`` so that it broadcasts over x: one number for all of x, for each index of an axis, or for blocks along it."""
    if value.dim() == 0 or value.numel() == 1:
        return value.reshape(())
    axis = axis % x.dim()
    if block_size and value.dim() == x.dim():
        return value.repeat_interleave(block_size, axis).narrow(axis, 0, int(x.shape[axis]))
    if value.dim() != 1:
        raise Unsupported(f"scales of {value.dim()} dimensions")
    return value.reshape(-1, *[1] * (x.dim() - 1 - axis))


def _rows(value: Tensor) -> Tensor:
    """Return one number for each row of a left side as a column."""
    return value[..., None] if value.dim() == 1 else value


def _of_outputs(value: Tensor, weight: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (weight.dim() - 1)) if value.numel() > 1 else value.reshape(())


def _difference(x: Tensor, zero: Tensor | None) -> Tensor:
    """Return x - zero in float32, which represents every such difference."""
    if x.dtype not in (torch.uint8, torch.int8):
        raise Unsupported(f"whole numbers of type {x.dtype}")
    return x.to(torch.float32) if zero is None else x.to(torch.float32) - zero.to(torch.float32)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1 or b.dim() == 1:
        return torch.matmul(a.double(), b.double()).to(torch.int32)
    return _in_parts(a.shape[-1], MAX_PRODUCTS, lambda s: torch.matmul(a[..., s], b[..., s, :]))


def _conv(x: Tensor, w: Tensor, group: int, window: dict[str, Any]) -> Tensor:
    taps = w[0, 0].numel()
    if w.shape[1] * taps > MAX_PRODUCTS and (group > 1 or taps > MAX_PRODUCTS):
        return conv(x.double(), w.double(), group=group, **window).to(torch.int32)
    if group > 1:
        return conv(x, w, group=group, **window).to(torch.int32)
    return _in_parts(w.shape[1], max(1, MAX_PRODUCTS // taps), lambda s: conv(x[:, s], w[:, s], **window))


def _in_parts(size: int, part: int, product: Callable[[slice], Tensor]) -> Tensor:
    """Return the sum of products over slices of at most ``part`` of ``size`` indices, in int32."""
    total = product(slice(0, part)).to(torch.int32)
    for start in range(part, size, part):
        total = total + product(slice(start, start + part)).to(torch.int32)
    return total
