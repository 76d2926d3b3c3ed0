"""Products with a weight and of two computed values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    accumulator,
    add_bias,
    aten,
    before_swap,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import batched, gemm
from thresher.ir.nodes import shape_of


@cpu_kernel(aten.linear.default)
def linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute x [..., I] times weight [O, I] -> [..., O] by the packed product; a weight that is computed is packed when it is there."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if len(shape_of(x)) < 2:
        return linear(importer, node)
    lead, (n, k) = sizes(x)[:-1], sizes(weight)
    machine = importer.cpu
    if not importer.is_constant(weight):
        return _linear_of_computed_weight(importer, node)
    plan = importer.choose(node, lambda limit: gemm.plans(math.prod(lead), n, (k,), machine, limit))
    if importer.shared_weights is not None:
        plan = _plan_of_shared_weights(importer, plan, math.prod(lead), importer.array(weight))
    plan, wide = widen(importer, node, plan)
    tile = plan.tile(machine)
    packed = importer.weight(gemm.pack(importer.array(weight), tile), (weight, tile))

    def compute(x: te.Tensor, w: te.Tensor) -> te.Tensor:
        return gemm.product(lambda m, i: x[(*gemm.unravel(m, lead), i)], w, (k,), lead, n, plan, wide)

    return add_bias(importer, importer.emit_te("linear", compute, importer.value(x), packed), bias, wide)


def _linear_of_computed_weight(importer: Importer, node: fx.Node) -> Any:
    """Emit the product of two computed values; the weight is the transposed right side."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    (*lead, n), k, machine = sizes(node), sizes(weight)[1], importer.cpu
    rows = math.prod(lead)
    if min(rows, n) < batched.MIN_ROWS:
        return linear(importer, node)
    plan = importer.choose(node, lambda limit: batched.plans(rows, n, k, 1, machine, limit))

    def multiply(x: te.Tensor, w: te.Tensor) -> te.Tensor:
        packed = batched.pack(lambda i, j: w[j, i], [], n, k, plan.vectors * machine.lanes)
        return batched.product(lambda m, i: x[m, i], packed, rows, n, plan)

    flat = importer.emit(R.reshape(importer.value(x), [rows, k]))
    value = add_bias(importer, importer.emit_te("matmul", multiply, flat, importer.value(weight)), bias)
    return importer.emit(R.reshape(value, [*lead, n]))


def _plan_of_shared_weights(importer: Importer, plan: gemm.Plan, rows: int, weight: np.ndarray) -> gemm.Plan:
    """Return the plan, or one for tiles of another width whose packed weight another model has already."""
    outputs, inputs = weight.shape
    assert importer.shared_weights is not None
    for vectors in (plan.vectors, 1, 2, 3, 4):
        candidates = gemm.plans(rows, outputs, (inputs,), importer.cpu, vectors=vectors)
        if candidates and importer.shared_weights.has(gemm.pack(weight, candidates[0].tile(importer.cpu))):
            return plan if vectors == plan.vectors else candidates[0]
    return plan


def widen(importer: Importer, node: fx.Node, plan: gemm.Plan) -> tuple[gemm.Plan, int]:
    """Return the plan of a product and its width (0: its own) with the zeros that a padding, the only user of ``node``, adds after its
    columns.

    So a narrow result and the wide one that it is added to (a residual) meet in the product's epilogue.
    """
    users, n = list(node.users), int(shape_of(node)[-1])
    if len(users) != 1 or users[0].target is not aten.constant_pad_nd.default:
        return plan, 0
    (before, after, *others), fill = users[0].args[1], argument(users[0], 2, "value", 0)
    if fill or before or after <= 0 or any(others):
        return plan, 0
    wider = gemm.widened(plan, n, n + after, importer.cpu)
    if wider is None:
        return plan, 0
    importer.as_user.add(node)
    return wider, n + after


@semantics(aten.linear.default)
def linear(importer: Importer, node: fx.Node) -> Any:
    """Compute x [..., I] times weight [O, I] -> [..., O] by TVM's product; half types are summed in float32."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if importer.is_constant(weight):
        w = importer.weight(np.ascontiguousarray(importer.array(weight).T), (weight, "transposed"))
    else:
        w = importer.emit(R.permute_dims(importer.value(weight)))
    value = cast(
        importer, importer.emit(R.matmul(importer.value(x), w, out_dtype=accumulator(node))), result_dtype(node)
    )
    return add_bias(importer, value, bias)


@cpu_kernel(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute a [.., M, K] @ b [.., K, N], batch dimensions broadcast; a transposed right side is packed from its source."""
    a, b = node.args[:2]
    shapes = [sizes(n) for n in (a, b)]
    if min(len(s) for s in shapes) < 2 or shapes[0][-2] < batched.MIN_ROWS or shapes[1][-1] < batched.MIN_ROWS:
        return matmul(importer, node)
    *lead, m, n = sizes(node)
    source = before_swap(b, -2, -1)
    machine, k = importer.cpu, shapes[0][-1]
    plan = importer.choose(node, lambda limit: batched.plans(m, n, k, math.prod(lead), machine, limit))

    def compute(x: te.Tensor, y: te.Tensor) -> te.Tensor:
        def left(*i: Any) -> Any:
            return x[(*_broadcast(i[:-2], shapes[0]), *i[-2:])]

        def right(*i: Any) -> Any:
            last = i[-2:] if source is None else (i[-1], i[-2])
            return y[(*_broadcast(i[:-2], shapes[1]), *last)]

        packed = batched.pack(right, lead, n, k, plan.vectors * machine.lanes)
        return batched.product(left, packed, m, n, plan)

    return importer.emit_te("matmul", compute, importer.value(a), importer.value(b if source is None else source))


def _broadcast(batch: Any, shape: list[int]) -> list[Any]:
    """Return the batch index of an operand of ``shape``, which may have fewer dimensions or single ones."""
    batch_shape = shape[:-2]
    return [
        tirx.const(0, "int64") if size == 1 else i
        for size, i in zip(batch_shape, batch[len(batch) - len(batch_shape) :])
    ]


@semantics(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(importer: Importer, node: fx.Node) -> Any:
    """Compute a product by TVM's, with the dtype of torch's result; half types are summed in float32."""
    a, b = (importer.value(n) for n in node.args[:2])
    return cast(importer, importer.emit(R.matmul(a, b, out_dtype=accumulator(node))), result_dtype(node))


@semantics(aten.addmm.default, aten.baddbmm.default)
def addmm(importer: Importer, node: fx.Node) -> Any:
    """Compute beta bias + alpha a @ b; a bias with beta 0 is not read."""
    bias, a, b = (importer.value(n) for n in node.args[:3])
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    dtype = result_dtype(node)
    value = cast(importer, importer.emit(R.matmul(a, b, out_dtype=accumulator(node))), dtype)
    value = value if alpha == 1 else importer.emit(R.multiply(value, relax.const(alpha, dtype)))
    if beta == 0:
        return value
    return importer.emit(R.add(value, bias if beta == 1 else importer.emit(R.multiply(bias, relax.const(beta, dtype)))))
