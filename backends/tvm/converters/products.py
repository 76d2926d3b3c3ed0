"""Products with a weight and of two computed values."""

from __future__ import annotations

import math
from typing import Any

from torch import fx
from tvm import relax, te

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    accumulator,
    add_bias,
    aten,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import gemm
from thresher.program import shape_of


@cpu_kernel(aten.linear.default)
def linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """x [..., I], weight [O, I] -> [..., O], by the packed product."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if not importer.is_constant(weight) or len(shape_of(x)) < 2:
        return linear(importer, node)
    lead, (n, k) = sizes(x)[:-1], sizes(weight)
    tile = gemm.choose_tile(math.prod(lead), n, k, importer.cpu)
    packed = importer.weight(gemm.pack(importer.array(weight), tile), (weight, tile))

    def compute(x: te.Tensor, w: te.Tensor) -> te.Tensor:
        return gemm.product(lambda m, i: x[(*gemm.unravel(m, lead), i)], w, (k,), lead, n, tile)

    return add_bias(importer, importer.emit_te("linear", compute, importer.value(x), packed), bias)


@semantics(aten.linear.default)
def linear(importer: Importer, node: fx.Node) -> Any:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    w = importer.emit(R.permute_dims(importer.value(weight)))
    value = cast(
        importer, importer.emit(R.matmul(importer.value(x), w, out_dtype=accumulator(node))), result_dtype(node)
    )
    return add_bias(importer, value, bias)


@semantics(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(importer: Importer, node: fx.Node) -> Any:
    a, b = (importer.value(n) for n in node.args[:2])
    return cast(importer, importer.emit(R.matmul(a, b, out_dtype=accumulator(node))), result_dtype(node))


@semantics(aten.addmm.default, aten.baddbmm.default)
def addmm(importer: Importer, node: fx.Node) -> Any:
    bias, a, b = (importer.value(n) for n in node.args[:3])
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    dtype = result_dtype(node)
    value = cast(importer, importer.emit(R.matmul(a, b, out_dtype=accumulator(node))), dtype)
    value = value if alpha == 1 else importer.emit(R.multiply(value, relax.const(alpha, dtype)))
    if beta == 0:
        return value
    return importer.emit(R.add(value, bias if beta == 1 else importer.emit(R.multiply(bias, relax.const(beta, dtype)))))
