"""Free sizes: symbols of torch's ``ShapeEnv`` -> variables of TVM's, and the expressions over them.

torch keeps a size as an expression of sympy; its interpreter of such expressions calls a function of a handler for each of
sympy's, which here makes the expression of TVM.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils._sympy.interp import sympy_interp
from tvm import sym, tirx

Size: TypeAlias = int | torch.SymInt | torch.SymFloat | torch.SymBool
#: The types of the values of sizes: in a graph they stand beside tensors.
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
#: Values of free sizes, for which two expressions that differ hardly come to the same.
VALUES = ((13, 17, 19, 23), (41, 29, 37, 31))


class Sizes:
    """The variables of the free sizes that are known so far."""

    def __init__(self) -> None:
        self._variables: dict[sympy.Symbol, tirx.Var] = {}

    def define(self, symbol: sympy.Symbol) -> tirx.Var:
        """Return the variable of a symbol, a new one where it is not known yet."""
        return self._variables.setdefault(symbol, tirx.Var(str(symbol), "int64"))

    def expression(self, size: Size | float) -> Any:
        """Return a size as a number or as an expression of TVM. Raises :class:`KeyError` for a symbol that is not known."""
        if not isinstance(size, SYMBOLIC):
            return size
        return sympy_interp(_HANDLER, self._variables, formula(size))

    def differ(self, actual: Any, size: Size) -> bool:
        """Return whether an expression of TVM is another number than ``size``, for some values of the free sizes that are known."""
        if self.unknown(size):
            return False
        pairs = [(self._at(actual, values), self._at(self.expression(size), values)) for values in VALUES]
        return any(a is not None and b is not None and a != b for a, b in pairs)

    def _at(self, expression: Any, values: Sequence[int]) -> int | None:
        """Return the number that an expression has for values of the free sizes, in turn; None where it has other variables."""
        if isinstance(
            expression, (int, tirx.IntImm)
        ):  # most are: an analyzer for each dimension of each call takes seconds
            return int(expression)
        analyzer = sym.Analyzer()
        for index, variable in enumerate(self._variables.values()):
            analyzer.bind(variable, tirx.IntImm("int64", values[index % len(values)]))
        number = analyzer.simplify(expression)
        return int(number) if isinstance(number, tirx.IntImm) else None

    def unknown(self, size: Size) -> set[sympy.Symbol]:
        """Return the symbols in ``size`` that have no variable yet."""
        return formula(size).free_symbols - self._variables.keys() if isinstance(size, SYMBOLIC) else set()


def formula(size: Size) -> sympy.Expr:
    """Return a size as an expression of sympy, with everything that torch knows of its symbols put in."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def symbols(shape: Iterable[Size]) -> set[sympy.Symbol]:
    """Return the symbols that the sizes of a shape are computed of."""
    return {symbol for size in shape for symbol in formula(size).free_symbols}


def inverse(size: torch.SymInt, symbol: sympy.Symbol) -> tuple[int, int]:
    """Return (a, b) where ``size`` is a * symbol + b.

    Raises :class:`NotImplementedError` naming the size where it is something else, or a is not positive.
    """
    expression = sympy.Poly(formula(size), symbol) if formula(size).is_polynomial(symbol) else None
    if expression is None or expression.degree() != 1 or formula(size).free_symbols != {symbol}:
        raise NotImplementedError(f"the size {size} of an input cannot be solved for {symbol}")
    a, b = (int(c) for c in expression.all_coeffs())
    if a <= 0:
        raise NotImplementedError(f"the size {size} of an input cannot be solved for {symbol}")
    return a, b


def _constant(value: Any, dtype: torch.dtype) -> Any:
    if dtype is torch.bool:
        return tirx.const(bool(value), "bool")
    return tirx.const(int(value), "int64") if dtype is torch.int64 else tirx.const(float(value), "float64")


def _natural_power(base: Any, exponent: Any) -> Any:
    if int(exponent) < 0:
        raise NotImplementedError("a size to a negative power")
    return functools.reduce(operator.mul, [base] * int(exponent), tirx.const(1, base.ty.dtype))


def _floating(value: Any) -> Any:
    return tirx.Cast("float64", value)


def _quotient(a: Any, b: Any) -> Any:
    return _floating(a) / _floating(b)


def _rounded(rounding: Callable[[Any], Any]) -> Callable[[Any, torch.dtype], Any]:
    return lambda a, dtype: tirx.Cast("int64", rounding(a))


#: The handler of torch's interpreter: a function for each function of sympy that sizes have.
_HANDLER = SimpleNamespace(
    constant=_constant,
    add=operator.add,
    mul=operator.mul,
    floordiv=tirx.floordiv,
    mod=tirx.floormod,
    python_mod=tirx.floormod,
    modular_indexing=lambda a, divisor, modulus: tirx.floormod(tirx.floordiv(a, divisor), modulus),
    pow_by_natural=_natural_power,
    pow=lambda base, exponent: tirx.pow(_floating(base), _floating(exponent)),
    sqrt=lambda a: tirx.sqrt(_floating(a)),
    int_truediv=_quotient,
    truediv=_quotient,
    to_dtype=lambda a, dtype: _floating(a) if dtype is torch.float64 else tirx.Cast("int64", a),
    trunc_to_int=_rounded(tirx.trunc),
    floor_to_int=_rounded(tirx.floor),
    ceil_to_int=_rounded(tirx.ceil),
    round_to_int=_rounded(tirx.nearbyint),
    minimum=tirx.min,
    maximum=tirx.max,
    identity=lambda a: a,
    where=tirx.Select,
    not_=tirx.Not,
    and_=tirx.And,
    or_=tirx.Or,
    eq=tirx.EQ,
    ne=tirx.NE,
    lt=tirx.LT,
    le=tirx.LE,
    gt=tirx.GT,
    ge=tirx.GE,
)
