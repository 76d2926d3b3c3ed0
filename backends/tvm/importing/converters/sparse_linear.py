"""Linear layers that skip zeros: kernels of ours on the CPU in float32, with what follows them, and for a few rows on GPUs; else dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.elementwise import gelu_of
from thresher.backends.tvm.importing.converters.products import linear
from thresher.backends.tvm.importing.converters.registry import (
    R,
    add_bias,
    aten,
    cast,
    cpu_kernel,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.converters.thresholds import element
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import elementwise, gemm
from thresher.backends.tvm.kernels.cpu import pruned_linear as pruned
from thresher.backends.tvm.kernels.cpu import sparse_linear as kernels
from thresher.backends.tvm.kernels.cuda import sparse_rows
from thresher.ir.nodes import dtype_of, is_tensor, shape_of


@semantics(ops.sparse_linear.default)
def sparse_linear(importer: Importer, node: fx.Node) -> Any:
    """Compute a linear layer: for a few rows on a GPU by a kernel that skips zeros, else dense."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    (n, k), m, dtype = sizes(weight), math.prod(sizes(x)[:-1]), result_dtype(node)
    if importer.machine is not None or not importer.is_constant(weight) or not sparse_rows.fits(m, n, dtype):
        return linear(importer, node)
    problem = sparse_rows.Problem(m, k, n, dtype)
    stored = importer.weight(np.ascontiguousarray(importer.array(weight).T), (weight, "transposed"))
    inputs = [_flat(importer, x, [m, k]), stored]
    parts = importer.emit_te("sparse_rows", partial(sparse_rows.sums, problem), *inputs, scheduled=True)
    out = cast(importer, importer.emit(R.sum(parts, [0])), dtype)
    return add_bias(importer, importer.emit(R.reshape(out, sizes(node))), bias)


@dataclass
class Epilogue:
    """The calls that follow a layer, each the only user of the one before, as steps on a result before it is stored."""

    steps: list[Callable[[Any, list[Any], Any, Any], Any]] = field(default_factory=list)
    more: list[Any] = field(default_factory=list)  # values that are read
    nodes: list[fx.Node] = field(default_factory=list)  # calls that are computed, too

    def read(self, value: Any) -> Callable[[list[Any], Any, Any], Any]:
        """Register one more operand, [n] or [m, n], and return how it is read at (row, column)."""
        at = len(self.more)
        self.more.append(value)
        rank = len(value.ty.shape)
        return lambda more, row, column: more[at][column] if rank == 1 else more[at][row, column]

    def finish(self, value: Any, row: Any, column: Any, *more: Any) -> Any:
        """Apply all steps to the value of an element; ``more`` are the operands in the order in which they were registered."""
        for step in self.steps:
            value = step(value, list(more), row, column)
        return value

    def operands(self) -> tuple[kernels.Operand, ...]:
        """Return the shapes and dtypes of the operands, for the kernel's signature."""
        return tuple(kernels.Operand(tuple(int(d) for d in v.ty.shape), str(v.ty.dtype)) for v in self.more)


def epilogue_of(importer: Importer, node: fx.Node, bias: fx.Node | None, m: int, n: int) -> Epilogue:
    """Return the bias, sums with values that are computed before, activations and thresholds that follow a layer [m, n]."""
    epilogue = Epilogue()
    if bias is not None:
        read = epilogue.read(importer.value(bias))
        epilogue.steps.append(lambda value, more, row, column: value + read(more, row, column))
    last = node
    while len(last.users) == 1:
        user = next(iter(last.users))
        step = (
            _step(importer, epilogue, user, last, m, n)
            if is_tensor(user) and shape_of(user) == shape_of(node)
            else None
        )
        if step is None or dtype_of(user) != dtype_of(node):
            break
        epilogue.steps.append(step)
        epilogue.nodes.append(user)
        last = user
    return epilogue


def _step(importer: Importer, epilogue: Epilogue, user: fx.Node, value: fx.Node, m: int, n: int) -> Any:
    if user.target in UNARY:
        function = UNARY[user.target](user)
        return lambda v, more, row, column: elementwise.named(v, function)
    if user.target is aten.add.Tensor and not user.kwargs and user.args[0] is not user.args[1]:
        other = user.args[1] if user.args[0] is value else user.args[0]
        read = _operand(importer, epilogue, other, m, n)
        return None if read is None else lambda v, more, row, column: v + read(more, row, column)
    if user.target is ops.shrink.default and user.args[0] is value and user.args[2] != "firm":
        limit, kind, keep = user.args[1], user.args[2], argument(user, 3, "keep", "nle")
        read = _operand(importer, epilogue, limit, m, n)
        if read is None:
            return None
        return lambda v, more, row, column: elementwise.named(
            v, lambda x: element(kind, keep, "float32", x, read(more, row, column), None)
        )
    return None


def _relu(x: Any) -> Any:
    return tirx.Select(x < _f(0), _f(0), x)


def _between(low: float, high: float) -> Callable[[Any], Any]:
    return lambda x: elementwise.clamp(x, low, high)


#: Functions of one element, by the call that names them.
UNARY: dict[Any, Callable[[fx.Node], Callable[[Any], Any]]] = {
    aten.relu.default: lambda node: _relu,
    aten.relu6.default: lambda node: _between(0.0, 6.0),
    aten.hardtanh.default: lambda node: _between(argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)),
    aten.gelu.default: gelu_of,
    aten.silu.default: lambda node: elementwise.silu,
    aten.hardswish.default: lambda node: elementwise.hardswish,
}


def _operand(importer: Importer, epilogue: Epilogue, node: Any, m: int, n: int) -> Any:
    """Return how a number, a vector over the columns, or a value of the result's size is read, if it is computed already."""
    if isinstance(node, (int, float)):
        return lambda more, row, column: _f(node)
    if not is_tensor(node) or str(dtype_of(node)) != "torch.float32":
        return None
    shape = shape_of(node)
    if importer.is_constant(node) and math.prod(shape) == 1:
        number = float(importer.array(node).reshape(()))
        return lambda more, row, column: _f(number)
    if node not in importer.env and not importer.is_constant(node):
        return None  # it comes later
    if math.prod(shape) == n and shape[-1] == n:
        return epilogue.read(_flat(importer, node, [n]))
    return epilogue.read(_flat(importer, node, [m, n])) if math.prod(shape) == m * n and shape[-1] == n else None


def _flat(importer: Importer, node: fx.Node, shape: list[int]) -> Any:
    value = importer.value(node)
    return value if list(map(int, value.ty.shape)) == shape else importer.emit(R.reshape(value, shape))


def _f(value: float) -> Any:
    return tirx.const(float(value), "float32")


@cpu_kernel(ops.sparse_linear.default)
def sparse_linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute x [..., K] times weight [N, K] -> [..., N] without the inputs that are 0, and what follows."""
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    if not importer.is_constant(weight):
        return linear(importer, node)
    (n, k), m, machine = sizes(weight), math.prod(sizes(x)[:-1]), importer.cpu
    epilogue = epilogue_of(importer, node, bias, m, n)
    problem = kernels.Problem(m, k, n, epilogue.operands())
    if m <= kernels.MAX_FEW_ROWS:
        array = np.zeros((k, kernels.padded(n, machine)), np.float32)
        array[:, :n] = importer.array(weight).T
        stored = importer.weight(array, (weight, "inputs first"))
        function = kernels.few_rows(problem, machine, epilogue.finish)
    else:
        tile = gemm.Tile(1, kernels.VECTORS, machine.lanes)
        stored = importer.weight(gemm.pack(importer.array(weight), tile), (weight, tile.columns))
        function = kernels.many_rows(problem, machine, epilogue.finish)
    inputs = [_flat(importer, x, [m, k]), stored, *epilogue.more]
    out = _call(importer, function, inputs, [m, n], sizes(node))
    for absorbed in epilogue.nodes:
        importer.env[absorbed] = out
    return out


def _call(importer: Importer, function: Any, inputs: list[Any], stored: list[int], shape: list[int]) -> Any:
    target = importer.builder.add_func(function, "sparse_linear")
    out = importer.emit(relax.call_tir(target, inputs, relax.TensorType(stored, "float32")))
    return out if shape == stored else importer.emit(R.reshape(out, shape))


@semantics(ops.gated_linear.default)
def gated_linear(importer: Importer, node: fx.Node) -> Any:
    """Multiply the dense layer with the gate; a gate of 0 is 0 whatever it meets, as long as that is finite."""
    gate = importer.value(node.args[3])
    return importer.emit(R.multiply(gate, linear(importer, node)))


@cpu_kernel(ops.gated_linear.default)
def gated_linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute, for a few rows, the outputs whose gate is not 0."""
    x, weight, bias, gate = node.args
    (n, k), m, machine = sizes(weight), math.prod(sizes(x)[:-1]), importer.cpu
    if not importer.is_constant(weight) or m > kernels.MAX_FEW_ROWS or k % machine.lanes:
        return gated_linear(importer, node)
    function = kernels.gated(kernels.Problem(m, k, n), machine, bias is not None)
    stored = importer.weight(np.ascontiguousarray(importer.array(weight)), (weight, "as it is"))
    inputs = [_flat(importer, x, [m, k]), stored, *([] if bias is None else [importer.value(bias)])]
    return _call(importer, function, [*inputs, _flat(importer, gate, [m, n])], [m, n], sizes(node))


@semantics(ops.pruned_linear.default)
def pruned_linear(importer: Importer, node: fx.Node) -> Any:
    """Compute a pruned layer as a dense one, where there is no kernel."""
    return linear(importer, node)


@cpu_kernel(ops.pruned_linear.default)
def pruned_linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute with the weight packed by its layout; runs are for one row."""
    x, weight, bias, layout = node.args
    if not importer.is_constant(weight):
        return linear(importer, node)
    (n, k), m, machine = sizes(weight), math.prod(sizes(x)[:-1]), importer.cpu
    layout = "rows" if layout == "runs" and m > 1 else layout
    epilogue = epilogue_of(importer, node, bias, m, n)
    packed = pruned.pack(
        importer.array(weight), layout, machine, pruned.group_of(m, n, machine) if layout == "rows" else 1
    )
    stored = [importer.weight(a, (weight, layout, packed.group, i)) for i, a in enumerate(packed.arrays)]
    problem = kernels.Problem(m, k, n, epilogue.operands())
    function = pruned.kernel(problem, packed, layout, machine, epilogue.finish)
    out = _call(importer, function, [_flat(importer, x, [m, k]), *stored, *epilogue.more], [m, n], sizes(node))
    for absorbed in epilogue.nodes:
        importer.env[absorbed] = out
    return out
