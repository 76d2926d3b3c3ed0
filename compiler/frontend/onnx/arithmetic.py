"""ONNX operators of two or more inputs that compute each element by itself, in torch.

quotient of whole numbers: towards 0        Mod: sign of the divisor, with ``fmod`` of the dividend
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import Number, Unsigned, rule
from thresher.frontend.onnx.unsigned import CARRIERS, LEAST
from thresher.frontend.onnx.values import Unsupported

Binary = Callable[[Tensor, Tensor], Tensor]


def binary(name: str, function: Binary, unsigned: Unsigned = "bits", old: bool = True) -> None:
    """Register an operator of two inputs: broadcast as NumPy does, and where it is ``old``, before opset 7 by attributes."""

    def broadcast_by_attributes(
        a: Tensor, b: Tensor, *, broadcast: int = 0, axis: int | None = None, consumed_inputs: Any = None
    ) -> Tensor:
        if not broadcast and a.shape != b.shape:
            raise Unsupported(f"shapes {tuple(a.shape)} and {tuple(b.shape)} without the attribute broadcast")
        aligned = b if axis is None else b.reshape(*b.shape, *[1] * (a.dim() - axis % a.dim() - b.dim()))
        return function(a, aligned)

    def broadcast_both(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b)

    if old:
        rule(name, unsigned=unsigned)(broadcast_by_attributes)
    rule(name, since=7, unsigned=unsigned)(broadcast_both)


def divided(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, of whole numbers the quotient towards 0."""
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return a / b
    return _of_unsigned(a, b, lambda x, y: torch.div(x, y, rounding_mode="trunc"), _unsigned_quotient)


def _of_unsigned(a: Tensor, b: Tensor, small: Binary, of_64_bits: Binary) -> Tensor:
    """Return ``small(a, b)``, computed in a wider type where torch lacks the one of unsigned integers."""
    if a.dtype not in CARRIERS:
        return small(a, b)
    x, y = a.to(CARRIERS[a.dtype]), b.to(CARRIERS[b.dtype])
    return (of_64_bits(x, y) if a.dtype == torch.uint64 else small(x, y)).to(a.dtype)


def _unsigned_quotient(x: Tensor, y: Tensor) -> Tensor:
    """Return the quotient of unsigned numbers whose 64 bits are those of x and y (as Java's divideUnsigned)."""
    half = (torch.div((x >> 1) & ~LEAST, y, rounding_mode="trunc")) << 1
    quotient = half + _not_below(x - half * y, y).to(torch.int64)
    return torch.where(y < 0, _not_below(x, y).to(torch.int64), quotient)


def _not_below(x: Tensor, y: Tensor) -> Tensor:
    return (x ^ LEAST) >= (y ^ LEAST)


def power(x: Tensor, exponent: Number) -> Tensor:
    """Return x to the power of the exponent, in the type of x."""
    if isinstance(exponent, Tensor) and exponent.dtype in CARRIERS:  # torch promotes no unsigned numbers
        exponent = exponent.to(x.dtype if x.is_floating_point() else CARRIERS[exponent.dtype])
    return (x**exponent).to(x.dtype)


binary("Add", torch.add)
binary("Sub", torch.sub)
binary("Mul", torch.mul)
binary("Div", divided, "native")
binary("Equal", torch.eq, "native")
binary("Pow", power, "native")
binary("Greater", torch.gt, "order")
binary("Less", torch.lt, "order")
binary("And", torch.logical_and)
binary("Or", torch.logical_or)
binary("Xor", torch.logical_xor)
binary("GreaterOrEqual", torch.ge, "order", old=False)
binary("LessOrEqual", torch.le, "order", old=False)
binary("BitwiseAnd", torch.bitwise_and, old=False)
binary("BitwiseOr", torch.bitwise_or, old=False)
binary("BitwiseXor", torch.bitwise_xor, old=False)
rule("Pow", since=7, unsigned="native")(power)


@rule("Mod", unsigned="native")
def modulo(a: Tensor, b: Tensor, *, fmod: int) -> Tensor:
    """Return the remainder of a / b, with the sign of b, or of a where ``fmod`` is set."""
    return _of_unsigned(a, b, torch.fmod if fmod else torch.remainder, lambda x, y: x - _unsigned_quotient(x, y) * y)


@rule("BitShift", unsigned="native")
def bit_shift(x: Tensor, amount: Tensor, *, direction: str) -> Tensor:
    """Return the bits of x moved by an amount, zeros following."""
    if direction == "LEFT":
        return _of_unsigned(x, amount, torch.bitwise_left_shift, torch.bitwise_left_shift)
    return _of_unsigned(x, amount, torch.bitwise_right_shift, _unsigned_right_shift)


def _unsigned_right_shift(x: Tensor, amount: Tensor) -> Tensor:
    return torch.where(amount == 0, x, ((x >> 1) & ~LEAST) >> (amount - 1).clamp(min=0))


@rule("Where", unsigned="native")
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a where the condition holds, else b."""
    return torch.where(condition, a, b)


def folded(name: str, function: Binary, unsigned: Unsigned = "bits") -> None:
    """Register an operator of any number of inputs, which joins two at a time."""

    def run(*values: Tensor) -> Tensor:
        return reduce(function, values)

    rule(name, unsigned=unsigned)(run)


folded("Max", torch.maximum, "order")
folded("Min", torch.minimum, "order")
folded("Sum", torch.add)


@rule("Mean")
def mean(*values: Tensor) -> Tensor:
    """Return the mean of all inputs."""
    return reduce(torch.add, values) / len(values)
