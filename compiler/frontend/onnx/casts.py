"""Conversions of element types.

to floating-point numbers of 8 bits or less: to the nearest, half to even; beyond the largest number that one (``saturate``), else
infinity or no number
"""

from __future__ import annotations

import math

import torch
from onnx import TensorProto
from torch import Tensor

from thresher.frontend.onnx.dtypes import HOLDERS, NARROW_RANGES, torch_dtype
from thresher.frontend.onnx.rules import Node, rule
from thresher.frontend.onnx.values import Unsupported

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers of FLOAT4E2M1 that are not negative


@rule("Cast", unsigned="native")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Return x in the type ``to``."""
    return converted(x, to, bool(saturate), round_mode)


@rule("CastLike", unsigned="native")
def cast_like(node: Node, x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Return x in the type of another tensor."""
    to = node.types[1]
    assert to is not None
    return converted(x, to, bool(saturate), round_mode)


@rule("BitCast", unsigned="native")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """Return the bits of x as numbers of another type of as many bits."""
    if to in HOLDERS or torch_dtype(to).itemsize != x.element_size():
        raise Unsupported("types of different sizes")
    return x.view(torch_dtype(to))


def converted(x: Tensor, to: int, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """Return x in the type that ONNX numbers ``to``."""
    dtype = torch_dtype(to)
    if to in NARROW_RANGES:
        return _wrapped(x, to)
    if to == TensorProto.FLOAT4E2M1:
        return _nearest(x.to(torch.float32), FLOAT4)
    if to == TensorProto.FLOAT8E8M0:
        return _power_of_two(x.to(torch.float32), saturate, round_mode)
    if dtype.is_floating_point and dtype.itemsize == 1:
        return _float8(x.to(torch.float32), dtype, saturate)
    if x.dtype.is_floating_point and x.element_size() == 1:
        return x.to(torch.float32).to(dtype)
    return x.to(dtype)


def _wrapped(x: Tensor, to: int) -> Tensor:
    """Return whole numbers modulo the size of a type of 4 or 2 bits."""
    low, high = NARROW_RANGES[to]
    whole = x.to(torch.int32)
    return (torch.remainder(whole - low, high - low + 1) + low).to(torch_dtype(to))


def _nearest(x: Tensor, magnitudes: tuple[float, ...]) -> Tensor:
    """Return the number of the nearest magnitude, half to the one of even index, and the sign of x."""
    result, size = torch.zeros_like(x), x.abs()
    for i in range(1, len(magnitudes)):
        half = (magnitudes[i - 1] + magnitudes[i]) / 2
        above = size >= half if i % 2 == 0 else size > half
        result = torch.where(above, torch.full_like(x, magnitudes[i]), result)
    return torch.where(
        x.isnan(), -0.0, torch.copysign(result, x)
    )  # as ONNX's reference has it: the type has no "no number"


#: The least magnitude that rounds beyond the largest number of a type: half a step above it, or the next number where a tie goes down.
OVERFLOWS = {
    torch.float8_e4m3fn: math.nextafter(464.0, 500.0), torch.float8_e4m3fnuz: 248.0, torch.float8_e5m2: 61440.0,
    torch.float8_e5m2fnuz: 61440.0,
}  # fmt: skip


def _float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    largest = torch.finfo(dtype).max
    within = torch.clamp(x, -largest, largest)
    if saturate:
        return within.to(dtype)
    beyond = torch.copysign(torch.full_like(x, math.inf if dtype == torch.float8_e5m2 else math.nan), x)
    return torch.where(x.abs() >= OVERFLOWS[dtype], beyond, within).to(dtype)


def _power_of_two(x: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Return the power of two for a positive number: the next one above or below, or the nearest."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa 2^exponent, the mantissa within 1/2 and 1
    exponent = exponent - 1
    if round_mode == "up":
        exponent = exponent + (mantissa > 0.5).to(exponent.dtype)
    elif round_mode == "nearest":
        exponent = exponent + (mantissa >= 0.75).to(exponent.dtype)
    bits = exponent + 127
    overflow = torch.full_like(bits, 254 if saturate else 255)
    underflow = torch.full_like(bits, 0 if saturate else 255)
    bits = torch.where((bits > 254) | x.isinf(), overflow, bits)
    bits = torch.where((bits < 0) | (x == 0), underflow, bits)
    return torch.where(x.isnan() | (x < 0), torch.full_like(bits, 255), bits).to(torch.uint8).view(torch.float8_e8m0fnu)
