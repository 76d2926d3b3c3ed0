"""The inputs of a program in Relax, and the places where free sizes get their values.

A size is bound where a tensor first has it as a dimension: an input, or the result of a call whose size its data decide. An input of a
derived size (2 s) takes any size, of which s is computed; then it is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import tvm
from torch import Tensor, fx
from tvm import relax, te, tirx

from thresher.backends.tvm.importing.sizes import Sizes, formula, inverse
from thresher.backends.tvm.importing.values import stored_dtype, tensor_type
from thresher.ir.nodes import shape_of


def input_variables(placeholders: Sequence[fx.Node], sizes: Sizes) -> list[relax.Var]:
    """Return the variables of tensor inputs, and define the sizes that stand alone in a dimension of one of them."""
    for node in placeholders:
        _define(shape_of(node), sizes)
    variables = []
    for node in placeholders:
        value = node.meta["val"]
        shape = [
            tirx.Var(f"{node.name}_{i}", "int64") if sizes.unknown(d) else sizes.expression(d)
            for i, d in enumerate(value.shape)
        ]
        kind = relax.TensorType([*shape, 2] if value.is_complex() else shape, stored_dtype(value.dtype))
        variables.append(relax.Var(node.name, kind))
    return variables


def bind_sizes(
    builder: relax.BlockBuilder, placeholders: Sequence[fx.Node], variables: Sequence[relax.Var], sizes: Sizes
) -> dict[fx.Node, Any]:
    """Define the sizes that are parts of a derived one only, and return each input with the sizes that the program has for it.

    Raises :class:`NotImplementedError` naming a size that cannot be solved for its symbol.
    """
    values: dict[fx.Node, Any] = {}
    for node, variable in zip(placeholders, variables):
        derived = [(d, v) for d, v in zip(shape_of(node), variable.ty.shape.values) if sizes.unknown(d)]
        for dim, actual in derived:
            for symbol in sizes.unknown(dim):
                a, b = inverse(dim, symbol)
                size = scalar_tensor(builder, tirx.floordiv(actual - b, a))
                shape = builder.emit(relax.op.tensor_to_shape(builder.emit(relax.op.reshape(size, [1]))))
                builder.match_cast(shape, relax.ShapeType([sizes.define(symbol)]))
        kind = tensor_type(node.meta["val"], sizes)
        values[node] = builder.match_cast(variable, kind) if derived else variable
    return values


def bound(builder: relax.BlockBuilder, result: Any, value: Tensor, sizes: Sizes) -> Any:
    """Return ``result`` with the sizes that the program has for it, and define those that are new.

    Raises :class:`NotImplementedError` where a new size is part of a derived one only.
    """
    if not any(map(sizes.unknown, value.shape)) and isinstance(result.ty.shape, relax.ShapeExpr):
        return result
    _define(value.shape, sizes)
    if unknown := [str(d) for d in value.shape if sizes.unknown(d)]:
        raise NotImplementedError(f"its size {unknown[0]} is derived from one that is not known")
    return builder.match_cast(result, tensor_type(value, sizes))


def variable(builder: relax.BlockBuilder, value: Any, name: str) -> tirx.Var:
    """Return a variable for an expression over sizes, which kernels and shapes may have."""
    result = tirx.Var(name, "int64")
    number = scalar_tensor(builder, tirx.Cast("int64", value))
    shape = builder.emit(relax.op.tensor_to_shape(builder.emit(relax.op.reshape(number, [1]))))
    builder.match_cast(shape, relax.ShapeType([result]))
    return result


def scalar_tensor(builder: relax.BlockBuilder, value: Any) -> Any:
    """Return a number, or an expression over sizes, as a tensor without dimensions."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value)
    variables = tirx.analysis.undefined_vars(value)  # a kernel takes these, not expressions over them

    def compute(*arguments: Any) -> te.Tensor:
        here = value
        for variable, argument in zip(variables, arguments):
            here = tirx.Let(variable, argument, here)
        return te.compute((), lambda: here, name="size")

    return builder.emit_te(compute, *variables, primfunc_name_hint="size")


def is_number(value: Any) -> bool:
    """Return whether a value is a number or an expression over sizes, not a tensor."""
    return isinstance(value, (bool, int, float)) or isinstance(getattr(value, "ty", None), tvm.ir.PrimType)


def _define(shape: Sequence[Any], sizes: Sizes) -> None:
    for dim in shape:
        if sizes.unknown(dim) and isinstance(formula(dim), sympy.Symbol):
            sizes.define(formula(dim))
