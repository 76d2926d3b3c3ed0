"""Division with rounding, remainders, powers and shifts: of whole numbers in their own dtype, and with torch's rules for signs.

Integers that are divided by 0 give 0, where eager raises: code would end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx
from tvm import te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import aten, cast, result_dtype, semantics
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu.elementwise import c_function
from thresher.backends.tvm.kernels.elementwise import broadcast


def _binary(importer: Importer, node: fx.Node, name: str, element: Callable[[Any, Any], Any]) -> Any:
    """Emit an elementwise function of two arguments, which are promoted as torch promotes them and broadcast.

    As in torch, bfloat16 is computed in float32: TVM does not take it for a float.
    """
    dtype = result_dtype(node)
    wide = "float32" if dtype == "bfloat16" else dtype
    a, b = (cast(importer, importer.value(v), wide) for v in node.args[:2])
    return cast(importer, importer.emit_te(name, partial(broadcast, "T_elementwise", element), a, b), dtype)


def _floating(node: fx.Node) -> bool:
    return "float" in result_dtype(node)


def _divisor(b: Any) -> Any:
    """Return a divisor that is not 0."""
    return tirx.Select(b == tirx.const(0, b.ty.dtype), tirx.const(1, b.ty.dtype), b)


def _unless_zero(b: Any, result: Any) -> Any:
    return tirx.Select(b == tirx.const(0, b.ty.dtype), tirx.const(0, b.ty.dtype), result)


def _differ(one: Any, other: Any) -> Any:
    """Return whether of two conditions one alone holds; code for ``!=`` of conditions is refused by LLVM."""
    return tirx.any(tirx.all(one, tirx.Not(other)), tirx.all(other, tirx.Not(one)))


def _floor_of_quotient(a: Any, b: Any) -> Any:
    """Compute floor(a / b) of floating numbers by the exact remainder, as torch does."""
    zero, one, half = (tirx.const(v, a.ty.dtype) for v in (0.0, 1.0, 0.5))
    rest = c_function("fmod", a, b)
    quotient = (a - rest) / b
    lower = tirx.all(rest != zero, _differ(b < zero, rest < zero))
    quotient = tirx.Select(lower, quotient - one, quotient)
    whole = te.floor(quotient)
    whole = tirx.Select(quotient - whole > half, whole + one, whole)
    return tirx.Select(b == zero, a / b, tirx.Select(quotient == zero, zero, whole))


@semantics(aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor_divide.default)
def divide_rounded(importer: Importer, node: fx.Node) -> Any:
    """Compute the quotient rounded down (floor) or towards 0 (trunc)."""
    mode = "floor" if node.target is aten.floor_divide.default else argument(node, 2, "rounding_mode")
    if mode not in ("floor", "trunc"):
        raise NotImplementedError(f"the rounding mode {mode!r}")
    if _floating(node):
        element = _floor_of_quotient if mode == "floor" else lambda a, b: te.trunc(a / b)
    else:
        rounded = tirx.floordiv if mode == "floor" else tirx.truncdiv
        element = lambda a, b: _unless_zero(b, rounded(a, _divisor(b)))  # noqa: E731
    return _binary(importer, node, "divide_rounded", element)


@semantics(
    aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor, aten.fmod.Tensor, aten.fmod.Scalar
)
def remainder(importer: Importer, node: fx.Node) -> Any:
    """Compute what is left of a division that rounds down (remainder, the sign of the divisor) or towards 0 (fmod)."""
    down = "remainder" in str(node.target)
    if not _floating(node):
        rest = tirx.floormod if down else tirx.truncmod
        return _binary(importer, node, "remainder", lambda a, b: _unless_zero(b, rest(a, _divisor(b))))

    def element(a: Any, b: Any) -> Any:
        rest, zero = c_function("fmod", a, b), tirx.const(0.0, a.ty.dtype)
        return tirx.Select(tirx.all(rest != zero, _differ(rest < zero, b < zero)), rest + b, rest) if down else rest

    return _binary(importer, node, "remainder", element)


@semantics(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(importer: Importer, node: fx.Node) -> Any:
    """Compute powers; of integers by squaring, bit by bit of the exponent, and negative exponents as torch has them."""
    if _floating(node):
        return _binary(importer, node, "power", te.power)
    if result_dtype(node) == "bool":
        raise NotImplementedError("powers of booleans")
    bits = 6 if result_dtype(node) == "int64" else 5  # beyond 2^63 only 0, 1 and -1 have powers that fit
    return _binary(importer, node, "power", lambda a, b: _integer_power(a, b, bits))


def _integer_power(a: Any, b: Any, bits: int) -> Any:
    one, two, zero = (tirx.const(v, a.ty.dtype) for v in (1, 2, 0))
    result, square = one, a
    for bit in range(bits):
        odd = tirx.floormod(tirx.floordiv(b, tirx.const(1 << bit, a.ty.dtype)), two) == one
        result = tirx.Select(odd, result * square, result)
        square = square * square
    sign = tirx.Select(tirx.floormod(b, two) == one, a, one)  # of 1 and -1, for any exponent
    small = tirx.any(a == one, a == zero - one)
    return tirx.Select(small, sign, tirx.Select(b < zero, zero, result))


@semantics(
    aten.__lshift__.Tensor,
    aten.__lshift__.Scalar,
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
)
def shift_left(importer: Importer, node: fx.Node) -> Any:
    """Shift the bits to the left; all out where the distance is negative or not less than the number of bits."""
    return _binary(importer, node, "shift_left", lambda a, b: _shifted(a, b, tirx.shift_left, 0))


@semantics(
    aten.__rshift__.Tensor,
    aten.__rshift__.Scalar,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
)
def shift_right(importer: Importer, node: fx.Node) -> Any:
    """Shift the bits to the right; only the sign is left where the distance is negative or not less than the number of bits."""
    return _binary(importer, node, "shift_right", lambda a, b: _shifted(a, b, tirx.shift_right, -1))


def _shifted(a: Any, b: Any, shift: Callable[[Any, Any], Any], beyond: int) -> Any:
    bits = int("".join(c for c in str(a.ty.dtype) if c.isdigit()))
    kind = a.ty.dtype
    inside = tirx.all(b >= tirx.const(0, kind), b < tirx.const(bits, kind))
    distance = tirx.Select(inside, b, tirx.const(0, kind))
    rest = (
        tirx.Select(a < tirx.const(0, kind), tirx.const(-1, kind), tirx.const(0, kind))
        if beyond
        else tirx.const(0, kind)
    )
    return tirx.Select(inside, shift(a, distance), rest)


@semantics(aten.fmax.default, aten.fmin.default)
def extremum_of_numbers(importer: Importer, node: fx.Node) -> Any:
    """Compute the larger (or smaller) of two numbers; one that is NaN does not count."""
    larger = node.target is aten.fmax.default

    def element(a: Any, b: Any) -> Any:
        picked = tirx.Select(a > b if larger else a < b, a, b)
        if not _floating(node):
            return picked
        return tirx.Select(tirx.isnan(a), b, tirx.Select(tirx.isnan(b), a, picked))

    return _binary(importer, node, "extremum", element)
