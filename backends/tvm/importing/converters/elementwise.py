"""Elementwise operators, where NaN, parameters or mixed dtypes need care."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    CPU_KERNELS,
    SEMANTICS,
    R,
    aten,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
)
from thresher.backends.tvm.importing.importer import Converter, Importer
from thresher.backends.tvm.kernels.cpu import elementwise, generic
from thresher.backends.tvm.kernels.cpu.generic import BIAS_MAP
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.runtime.tensor_spec import dtype_name

#: Functions whose expressions read their argument many times.
SMOOTH = frozenset(
    getattr(aten, name).default
    for name in "exp erf tanh sigmoid silu gelu elu selu celu softplus mish hardswish hardsigmoid".split()
)


def _elementary(function: Callable[[Any], Any]) -> Converter:
    def convert(importer: Importer, node: fx.Node) -> Any:
        value = cast(importer, importer.value(node.args[0]), "float32")
        return importer.emit_te(
            str(node.target).split(".")[1],
            lambda t: te.compute(t.shape, lambda *i: elementwise.named(t(*i), function), name=block_of(node)),
            value,
        )

    return convert


for _name, _function in elementwise.VECTORISED.items():
    CPU_KERNELS[getattr(aten, _name).default] = _elementary(_function)


def block_of(node: fx.Node) -> str:
    """Return the name of a kernel's block. Of smooth functions that follow each other every second one is a kernel of its own: TVM puts
    their expressions into each other wherever the value is read, and four of them take minutes to simplify.
    """
    length = 0
    while is_tensor(node.args[0]) and node.args[0].target in SMOOTH:
        node, length = node.args[0], length + 1
    return generic.APART if length % 2 else "T_elementwise"


def gelu_of(node: fx.Node) -> Callable[[Any], Any]:
    """Return the GELU of a node on expressions: exact, or its approximation by tanh."""
    return elementwise.gelu_tanh if argument(node, 1, "approximate", "none") == "tanh" else elementwise.gelu


@cpu_kernel(aten.gelu.default)
def gelu_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute GELU by polynomials."""
    return _elementary(gelu_of(node))(importer, node)


def _arithmetic(operation: Callable, of_truth_values: Callable | None = None) -> Converter:
    """Return the converter of a binary operation with an ``alpha``; mixed dtypes are promoted as torch promotes them."""

    def convert(importer: Importer, node: fx.Node) -> Any:
        dtype = result_dtype(node)
        a, b = (cast(importer, _from_memory(importer.value(x), node), dtype) for x in node.args[:2])
        if dtype == "bool" and of_truth_values is not None:  # TVM's own is for numbers
            return importer.emit(of_truth_values(a, b))
        alpha = argument(node, 2, "alpha", 1)
        if alpha != 1:
            b = importer.emit(R.multiply(b, relax.const(alpha, dtype)))
        return importer.emit(operation(a, b))

    return convert


def _from_memory(value: Any, node: fx.Node) -> Any:
    """Return a literal 0 as an array of one element: TVM takes a product with the number for 0, also where the factor is not finite."""
    floating = dtype_of(node).is_floating_point and shape_of(node)
    return relax.const(np.zeros(1), result_dtype(node)) if floating and _is_zero(value) else value


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


SEMANTICS[aten.add.Tensor] = SEMANTICS[aten.add.Scalar] = _arithmetic(R.add, R.logical_or)


@cpu_kernel(aten.add.Tensor)
def add_kernel(importer: Importer, node: fx.Node) -> Any:
    """Add; a constant image that repeats itself is stored once.

    An image that is constant in its whole interior, or periodic, is what folded channels leave after a padded or a transposed
    convolution; all of it would be read from memory at every call.
    """
    image = node.args[1]
    plain = dtype_of(node) is not torch.bool and not node.kwargs and len(node.args) == 2
    if plain and importer.is_constant(image) and shape_of(image) == shape_of(node):
        table, places = compact(importer.array(image))
        if 2 * table.size <= importer.array(image).size:

            def compute(t: te.Tensor, w: te.Tensor) -> te.Tensor:
                return te.compute(
                    t.shape, lambda *i: t(*i) + w(*(f(x) for f, x in zip(places, i)), i[-1]), name=BIAS_MAP
                )

            return importer.emit_te(
                "add", compute, importer.value(node.args[0]), importer.weight(table, (image, "compact"))
            )
    return SEMANTICS[aten.add.Tensor](importer, node)


def compact(array: np.ndarray) -> tuple[np.ndarray, list[Callable[[Any], Any]]]:
    """Return a smaller table and, for every dimension but the last, the function from an index to its index in the table."""
    places: list[Callable[[Any], Any]] = []
    for dim in range(array.ndim - 1):
        seen: dict[bytes, int] = {}
        slices = [seen.setdefault(part.tobytes(), len(seen)) for part in np.moveaxis(array, dim, 0)]
        runs = [(len(list(group)), value) for value, group in itertools.groupby(slices)]
        length, value = max(runs)
        first = next(i for i in range(len(slices)) if slices[i : i + length] == [value] * length)
        period = next(p for p in range(1, len(slices) + 1) if slices[p:] == slices[:-p])
        if len(slices) - length + 1 < period:
            last = first + length - 1
            array = np.delete(array, range(first + 1, last + 1), dim)
            places.append(partial(_beside, first, last))
        else:
            array = np.take(array, range(period), dim)
            places.append(partial(_repeated, period))
    return np.ascontiguousarray(array), places


def _beside(first: int, last: int, index: Any) -> Any:
    """Return the index in the table when those from ``first`` to ``last`` are one."""
    return te.min(index, first) + te.max(index - last, 0)


def _repeated(period: int, index: Any) -> Any:
    return index % period


SEMANTICS[aten.sub.Tensor] = SEMANTICS[aten.sub.Scalar] = _arithmetic(R.subtract)


SEMANTICS[aten.mul.Tensor] = SEMANTICS[aten.mul.Scalar] = _arithmetic(lambda a, b: R.multiply(a, b), R.logical_and)


SEMANTICS[aten.div.Tensor] = SEMANTICS[aten.div.Scalar] = _arithmetic(
    R.divide
)  # int / int: the result dtype is floating


def _comparison(operation: Callable) -> Converter:
    """Return the converter of a comparison, in the dtype that torch compares in."""

    def convert(importer: Importer, node: fx.Node) -> Any:
        dtype = dtype_name(torch.result_type(*map(_like, node.args[:2])))
        return importer.emit(operation(*(cast(importer, importer.value(x), dtype) for x in node.args[:2])))

    return convert


def _like(operand: Any) -> Any:
    """Return something that torch promotes as it promotes this operand: a tensor, a number, or a size or number that is computed."""
    if not isinstance(operand, fx.Node):
        return operand
    if not is_tensor(operand):
        return operand.meta["val"].node.pytype()
    return torch.empty([1] * len(shape_of(operand)), dtype=dtype_of(operand))


for _name, _operation in {
    "eq": R.equal,
    "ne": R.not_equal,
    "lt": R.less,
    "le": R.less_equal,
    "gt": R.greater,
    "ge": R.greater_equal,
}.items():
    SEMANTICS[getattr(aten, _name).Tensor] = SEMANTICS[getattr(aten, _name).Scalar] = _comparison(_operation)


@semantics(aten.isnan.default)
def is_nan(importer: Importer, node: fx.Node) -> Any:
    """Return whether each element is NaN, which TVM cannot ask of bfloat16."""
    value = importer.value(node.args[0])
    if not dtype_of(node.args[0]).is_floating_point:
        raise NotImplementedError("numbers that are never NaN")
    return importer.emit(R.isnan(cast(importer, value, "float32") if "bfloat16" in str(value.ty.dtype) else value))


ARITHMETIC = frozenset(
    overload
    for name in "round add sub mul div neg _to_copy relu".split()
    for overload in (getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads())
)


def _is_opaque(node: fx.Node) -> bool:
    """Return whether a clamp is a kernel of its own. Of the steps of a quantised model that follow each other with nothing but
    arithmetic between, every second one is: TVM puts a value that is read twice into both readers, and may not do so with names within
    names.
    """
    rounded, others = 0, int(node.target is not aten.clamp.default)
    while is_tensor(node.args[0]) and node.args[0].target in (*ARITHMETIC, aten.clamp.default):
        node = node.args[0]
        rounded += node.target is aten.round.default
        others += node.target is aten.relu.default
    return rounded > 0 and (rounded + others) % 2 == 0


def _clamped(importer: Importer, x: Any, low: float | None, high: float | None, opaque: bool = False) -> Any:
    """Clamp by comparisons that a NaN passes through (max and min would swallow it)."""

    def compute(t: te.Tensor) -> te.Tensor:
        def element(value: Any) -> Any:
            result, dtype = value, str(value.ty.dtype)
            if high is not None:
                result = tirx.Select(value > tirx.const(high, dtype), tirx.const(high, dtype), result)
            if low is not None:
                result = tirx.Select(value < tirx.const(low, dtype), tirx.const(low, dtype), result)
            return result if low is None or high is None or low <= high else tirx.const(high, dtype)

        return te.compute(t.shape, lambda *i: elementwise.named(t(*i), element), name="T_clamp")

    return importer.emit_te("clamp", compute, x, opaque=opaque)


@semantics(aten.relu.default)
def relu(importer: Importer, node: fx.Node) -> Any:
    """Compute max(x, 0); a NaN stays."""
    return _clamped(importer, importer.value(node.args[0]), 0, None, _is_opaque(node))


@semantics(aten.relu6.default)
def relu6(importer: Importer, node: fx.Node) -> Any:
    """Compute min(max(x, 0), 6); a NaN stays."""
    return _clamped(importer, importer.value(node.args[0]), 0, 6)


@semantics(aten.hardtanh.default)
def hardtanh(importer: Importer, node: fx.Node) -> Any:
    """Clamp to [min_val, max_val]; a NaN stays."""
    return _clamped(
        importer, importer.value(node.args[0]), argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    )


@semantics(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def clamp(importer: Importer, node: fx.Node) -> Any:
    """Clamp to numbers, either of which may be missing; where they cross, the upper one wins, as in torch."""
    value = cast(importer, importer.value(node.args[0]), result_dtype(node))
    if node.target is aten.clamp_max.default:
        return _clamped(importer, value, None, node.args[1])
    return _clamped(importer, value, argument(node, 1, "min"), argument(node, 2, "max"), _is_opaque(node))
