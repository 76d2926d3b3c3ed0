"""Activations, and exponential functions near the points where 1 + x and e^x - 1 would lose all digits of x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx
from tvm import te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.elementwise import block_of
from thresher.backends.tvm.importing.converters.registry import SEMANTICS, aten, cast, result_dtype, semantics
from thresher.backends.tvm.importing.importer import Converter, Importer
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.backends.tvm.kernels.cpu.elementwise import c_function, log1p


@dataclass(frozen=True)
class _Functions:
    """The exponential functions that an activation is made of."""

    exp: Callable[[Any], Any]
    expm1: Callable[[Any], Any]


VECTORISED = _Functions(elementwise.exp, elementwise.expm1)
OF_LIBRARY = _Functions(te.exp, partial(c_function, "expm1"))


def _by_c_library(name: str) -> Converter:
    """Return the converter that calls this function for each element, in float32 where the result is of a half type."""

    def convert(importer: Importer, node: fx.Node) -> Any:
        value = cast(importer, importer.value(node.args[0]), result_dtype(node))
        return importer.emit_te(
            name, lambda t: te.compute(t.shape, lambda *i: c_function(name, t(*i)), name="T_elementwise"), value
        )

    return convert


for _name in ("log1p", "expm1", "atanh", "tanh"):  # TVM's lose the digits of small arguments
    SEMANTICS[getattr(aten, _name).default] = _by_c_library(_name)


@semantics(aten.elu.default)
def elu(importer: Importer, node: fx.Node) -> Any:
    """Compute scale x for x > 0, else scale alpha (exp(input_scale x) - 1)."""
    alpha, scale, input_scale = (
        float(argument(node, i, k, 1)) for i, k in ((1, "alpha"), (2, "scale"), (3, "input_scale"))
    )
    return _smooth(
        importer,
        node,
        lambda x, f: tirx.Select(x > 0, x * _c(scale, x), _c(scale * alpha, x) * f.expm1(x * _c(input_scale, x))),
    )


@semantics(aten.selu.default)
def selu(importer: Importer, node: fx.Node) -> Any:
    """Compute ELU with the constants of Klambauer et al. (2017)."""
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return _smooth(
        importer,
        node,
        lambda x, f: tirx.Select(x > 0, x * _c(scale, x), _c(scale * alpha, x) * f.expm1(x)),
    )


@semantics(aten.celu.default)
def celu(importer: Importer, node: fx.Node) -> Any:
    """Compute x for x > 0, else alpha (exp(x / alpha) - 1)."""
    alpha = float(argument(node, 1, "alpha", 1.0))
    return _smooth(importer, node, lambda x, f: tirx.Select(x > 0, x, _c(alpha, x) * f.expm1(x * _c(1 / alpha, x))))


@semantics(aten.softplus.default)
def softplus(importer: Importer, node: fx.Node) -> Any:
    """Compute log(1 + exp(beta x)) / beta, and x where beta x exceeds the threshold."""
    beta, threshold = float(argument(node, 1, "beta", 1)), float(argument(node, 2, "threshold", 20))
    return _smooth(
        importer,
        node,
        lambda x, f: tirx.Select(
            x * _c(beta, x) > _c(threshold, x), x, log1p(f.exp(x * _c(beta, x))) * _c(1 / beta, x)
        ),
    )


@semantics(aten.mish.default)
def mish(importer: Importer, node: fx.Node) -> Any:
    """Compute x tanh(log(1 + exp(x))) as x n / (n + 2) with n = e (e + 2), e = exp(x); it is x where e^2 would be too large."""

    def element(x: Any, f: _Functions) -> Any:
        most = _c(5.0 if str(x.ty.dtype) == "float16" else 20.0, x)
        e = f.exp(tirx.Select(x > most, most, x))
        n = e * (e + _c(2.0, x))
        return tirx.Select(x > most, x, x * (n / (n + _c(2.0, x))))

    return _smooth(importer, node, element)


@semantics(aten.hardswish.default)
def hardswish(importer: Importer, node: fx.Node) -> Any:
    """Compute x min(max(x + 3, 0), 6) / 6."""
    return _smooth(importer, node, lambda x, f: elementwise.hardswish(x))


@semantics(aten.hardsigmoid.default)
def hardsigmoid(importer: Importer, node: fx.Node) -> Any:
    """Compute min(max(x + 3, 0), 6) / 6."""
    return _smooth(importer, node, lambda x, f: te.max(te.min(x + _c(3.0, x), _c(6.0, x)), _c(0.0, x)) * _c(1 / 6, x))


@semantics(aten.leaky_relu.default)
def leaky_relu(importer: Importer, node: fx.Node) -> Any:
    """Compute x for x > 0, else negative_slope x."""
    slope = float(argument(node, 1, "negative_slope", 0.01))
    return _smooth(importer, node, lambda x, f: tirx.Select(x > 0, x, x * _c(slope, x)))


@semantics(aten.threshold.default)
def threshold(importer: Importer, node: fx.Node) -> Any:
    """Compute x above the threshold, the value elsewhere; a NaN stays."""
    limit, value = (float(v) for v in node.args[1:3])
    return _smooth(importer, node, lambda x, f: tirx.Select(x <= _c(limit, x), _c(value, x), x))


def _c(value: float, like: Any) -> Any:
    return tirx.const(value, like.ty.dtype if hasattr(like, "ty") else like.dtype)


def _smooth(importer: Importer, node: fx.Node, element: Callable[[Any, _Functions], Any]) -> Any:
    """Emit an elementwise function of the argument and of exponential functions: vectorised ones for float32 on the CPU."""
    value = importer.value(node.args[0])
    fast = importer.machine is not None and str(value.ty.dtype) == "float32"
    functions = VECTORISED if fast else OF_LIBRARY
    return importer.emit_te(
        "elementwise",
        lambda t: te.compute(
            t.shape, lambda *i: elementwise.named(t(*i), lambda x: element(x, functions)), name=block_of(node)
        ),
        value,
    )
