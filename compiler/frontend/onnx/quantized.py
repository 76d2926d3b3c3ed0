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
from torch import Tensor

from thresher.frontend.onnx.layers import conv
from thresher.frontend.onnx.rules import Node, Unsupported, rule

LEVELS = {torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767)}
MAX_PRODUCTS = (1 << 24) // (255 * 255)  # products of 9-bit differences whose sum is a whole number in float32


@rule("QuantizeLinear")
def quantize(node: Node, x: Tensor, scale: Any, zero: Any = None) -> Tensor:
    """Return x / scale rounded to the type of ``zero``, uint8 without one."""
    x = node.tensor(x)
    if node.get("block_size", 0) or not x.is_floating_point():
        raise Unsupported("blocks, or numbers that are no floating-point ones")
    point = torch.zeros((), dtype=torch.uint8) if zero is None else node.tensor(zero)
    return _saturated(x / _along(node, node.tensor(scale), x), _along(node, point, x))


@rule("DequantizeLinear")
def dequantize(node: Node, x: Any, scale: Any, zero: Any = None) -> Tensor:
    """Return (x - zero) * scale in the type of ``scale``."""
    if node.get("block_size", 0):
        raise Unsupported("blocks")
    x, scale = node.tensor(x), node.tensor(scale)
    whole = x.to(torch.int32)
    if zero is not None:
        whole = whole - _along(node, node.tensor(zero).to(torch.int32), x)
    return whole.to(scale.dtype) * _along(node, scale, x)


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: Node, x: Tensor) -> Sequence[Tensor]:
    """Return x in uint8 by the range of its values, with its scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # as onnxruntime: the standard would divide by 0
    zero = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return _saturated(x / scale, zero), scale, zero


@rule("MatMulInteger")
def matmul_integer(node: Node, a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> Tensor:
    """Return the product of two integer matrices in int32."""
    left, right = (node.tensor(v) for v in (a, b))
    rows = _difference(left, a_zero if a_zero is None else _column(node.tensor(a_zero)))
    return _matmul(rows, _difference(right, None if b_zero is None else node.tensor(b_zero)))


@rule("QLinearMatMul")
def qlinear_matmul(
    node: Node, a: Any, a_scale: Any, a_zero: Any, b: Any, b_scale: Any, b_zero: Any, y_scale: Any, y_zero: Any
) -> Tensor:
    """Return the product of two quantised matrices, quantised."""
    left, right, zero = (node.tensor(v) for v in (a, b, y_zero))
    total = _matmul(_difference(left, _column(node.tensor(a_zero))), _difference(right, node.tensor(b_zero)))
    scale = _column(node.tensor(a_scale)) * node.tensor(b_scale) / node.tensor(y_scale)
    return _saturated(total.to(scale.dtype) * scale, zero)


@rule("ConvInteger")
def conv_integer(node: Node, x: Any, w: Any, x_zero: Any = None, w_zero: Any = None) -> Tensor:
    """Return the convolution of integers in int32."""
    image, weight = node.tensor(x), node.tensor(w)
    zero = None if w_zero is None else _of_outputs(node.tensor(w_zero), weight)
    return _conv(node, _difference(image, None if x_zero is None else node.tensor(x_zero)), _difference(weight, zero))


@rule("QLinearConv")
def qlinear_conv(
    node: Node,
    x: Any,
    x_scale: Any,
    x_zero: Any,
    w: Any,
    w_scale: Any,
    w_zero: Any,
    y_scale: Any,
    y_zero: Any,
    bias: Any = None,
) -> Tensor:
    """Return the convolution of quantised tensors, quantised."""
    image, weight = node.tensor(x), node.tensor(w)
    zero = _of_outputs(node.tensor(w_zero), weight)
    total = _conv(node, _difference(image, node.tensor(x_zero)), _difference(weight, zero))
    if bias is not None:
        total = total + node.tensor(bias).reshape(-1, *[1] * (total.dim() - 2))
    scale = node.tensor(w_scale) * node.tensor(x_scale) / node.tensor(y_scale)
    scale = scale.reshape(-1, *[1] * (total.dim() - 2)) if scale.numel() > 1 else scale
    return _saturated(total.to(scale.dtype) * scale, node.tensor(y_zero))


# ---------------------------------------------------------------------- numbers


def _saturated(x: Tensor, zero: Tensor) -> Tensor:
    """Return x rounded, half to even, plus ``zero``, within the limits of the type of ``zero``."""
    if zero.dtype not in LEVELS:
        raise Unsupported(f"numbers of type {zero.dtype}")
    return torch.clamp(torch.round(x) + zero.to(x.dtype), *LEVELS[zero.dtype]).to(zero.dtype)


def _along(node: Node, value: Tensor, x: Tensor) -> Tensor:
    """Return ``value`` so that it broadcasts over x: one number for all of x, or one for each index of an axis."""
    if value.dim() == 0 or value.numel() == 1:
        return value.reshape(())
    axis = node.get("axis", 1) % x.dim()
    return value.reshape(-1, *[1] * (x.dim() - 1 - axis))


def _column(value: Tensor) -> Tensor:
    """Return one number for each row of a left side as a column."""
    return value[..., None] if value.dim() else value


def _of_outputs(value: Tensor, weight: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (weight.dim() - 1)) if value.numel() > 1 else value.reshape(())


def _difference(x: Tensor, zero: Tensor | None) -> Tensor:
    """Return x - zero in float32, which represents every such difference."""
    if x.dtype not in (torch.uint8, torch.int8):
        raise Unsupported(f"whole numbers of type {x.dtype}")
    return x.to(torch.float32) if zero is None else x.to(torch.float32) - zero.to(torch.float32)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _in_parts(a.shape[-1], MAX_PRODUCTS, lambda s: torch.matmul(a[..., s], b[..., s, :]))


def _conv(node: Node, x: Tensor, w: Tensor) -> Tensor:
    taps, groups = w[0, 0].numel(), node.get("group", 1)
    if w.shape[1] * taps > MAX_PRODUCTS and (groups > 1 or taps > MAX_PRODUCTS):
        return conv(node, x.double(), w.double()).to(torch.int32)
    if groups > 1:
        return conv(node, x, w).to(torch.int32)
    return _in_parts(w.shape[1], max(1, MAX_PRODUCTS // taps), lambda s: conv(node, x[:, s], w[:, s]))


def _in_parts(size: int, part: int, product: Callable[[slice], Tensor]) -> Tensor:
    """Return the sum of products over slices of at most ``part`` of ``size`` indices, in int32."""
    total = product(slice(0, part)).to(torch.int32)
    for start in range(part, size, part):
        total = total + product(slice(start, start + part)).to(torch.int32)
    return total
