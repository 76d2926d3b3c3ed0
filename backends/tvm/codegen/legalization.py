"""Kernels of operators for which TVM's own legalization writes a warning on standard error at every use."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, te, topi

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
    if (
        isinstance(exponent, tvm.ir.GenericConst)
        and exponent.ty.ndim == 0
        and exponent.value.numpy() >= SUSPICIOUS_EXPONENT
    ):
        return builder.call_te(topi.power, base, exponent)
    return call.op.get_attr("FLegalize")(builder, call)


#: For ``relax.transform.LegalizeOps``.
LEGALIZATIONS = {"relax.take": legalize_take, "relax.power": legalize_power}


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
