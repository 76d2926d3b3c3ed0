"""Kernels of operators whose own legalization by TVM writes a warning at every use, or has values that floating-point numbers have not.

TVM simplifies kernels by rules that hold for real numbers alone: ``x - x`` is 0, ``(x + y) - y`` is ``x``, ``x == x`` is true, and
``not (x < y)`` is ``y <= x``. Rounding, infinities and NaN know better, and a model may live from it (``torch.where(x == x, x, 0)``). The
kernels here say the same in a form for which there is no such rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm
from tvm import relax, te, tirx, topi

from thresher.backends.tvm.kernels.elementwise import broadcast

SUSPICIOUS_EXPONENT = 3  # the constant from which on TVM warns of tirx.pow


def legalize_take(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Return the kernel of a ``relax.take``: TVM's own but in the mode ``fast``, of which it warns that indices are not checked."""
    if call.attrs.mode == "fast":
        return builder.call_te(take, call.args[0], call.args[1], call.attrs.axis)
    return call.op.get_attr("FLegalize")(builder, call)


def legalize_power(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Return the kernel of a ``relax.power``: TVM's own but for large constant exponents, which are read from memory instead.

    TVM warns of them in the text of a kernel, where every pass that rewrites it does so again.
    """
    base, exponent = call.args
    if _is_number(exponent) and exponent.value.numpy() >= SUSPICIOUS_EXPONENT:
        return builder.call_te(topi.power, base, exponent)
    return call.op.get_attr("FLegalize")(builder, call)


def _is_number(value: Any) -> bool:
    """Return whether an argument is a constant without dimensions."""
    return isinstance(value, tvm.ir.GenericConst) and value.ty.ndim == 0


def _not(condition: Any) -> Any:
    return tirx.Select(condition, tirx.const(False, "bool"), tirx.const(True, "bool"))


def _equal(a: Any, b: Any) -> Any:
    return tirx.all(a <= b, b <= a)


#: Operators of floating-point numbers -> the element of the result, of those of the arguments.
OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "subtract": lambda a, b: a + b * tirx.const(-1, b.ty.dtype),
    "equal": _equal,
    "not_equal": lambda a, b: _not(_equal(a, b)),
}
#: The same of conditions.
OF_CONDITIONS: dict[str, Callable[..., Any]] = {
    "logical_not": _not,
    "logical_or": lambda a, b: _not(tirx.all(_not(a), _not(b))),
}


def legalize_literally(builder: relax.BlockBuilder, call: relax.Call) -> Any:
    """Return the kernel of an operator of OF_NUMBERS or OF_CONDITIONS."""
    name = call.op.name.removeprefix("relax.")
    kinds = {"float" in str(a.ty.dtype) for a in call.args}
    if kinds != {name in OF_NUMBERS} or all(map(_is_number, call.args)):
        return call.op.get_attr("FLegalize")(builder, call)
    element = OF_NUMBERS.get(name) or OF_CONDITIONS[name]
    arguments = [tirx.const(a.value.numpy().item(), a.ty.dtype) if _is_number(a) else a for a in call.args]
    return builder.call_te(partial(broadcast, f"T_{name}", element), *arguments, primfunc_name_hint=name)


#: For ``relax.transform.LegalizeOps``.
LEGALIZATIONS = {
    "relax.take": legalize_take,
    "relax.power": legalize_power,
    **{f"relax.{name}": legalize_literally for name in (*OF_NUMBERS, *OF_CONDITIONS)},
}


def take(x: te.Tensor, indices: te.Tensor, axis: Any) -> te.Tensor:
    """Return x[before, indices[middle], after], where ``middle`` stands in the dimension ``axis``; without one ``x`` has one dimension.

    The names of the result and of its loops are TVM's.
    """
    first, rank = 0 if axis is None else int(axis) % len(x.shape), len(indices.shape)

    def element(*i: Any) -> Any:
        index = indices[i[first : first + rank] if rank else ()]
        return x[(*i[:first], index % x.shape[0] if axis is None else index, *i[first + rank :])]

    shape = [*x.shape[:first], *indices.shape, *x.shape[first + 1 :]]
    return te.compute(shape, element, "T_take", varargs_names=[f"ax{d}" for d in range(len(shape))])
