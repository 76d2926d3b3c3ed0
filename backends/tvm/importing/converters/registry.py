"""The tables of converters, and what converters share.

``SEMANTICS`` holds for every target; ``CPU_KERNELS`` come first on the CPU, for float32 and static shapes. ``COMPLEX`` alone is for calls
with complex numbers, which are pairs of real ones. A converter is ``f(importer, node) -> expression``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax, te, tirx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.backends.tvm.importing.importer import Converter, Importer
from thresher.backends.tvm.importing.inputs import is_number, scalar_tensor
from thresher.backends.tvm.importing.values import is_empty, tensors_of
from thresher.backends.tvm.kernels.cpu.elementwise import widened
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.runtime.tensor_spec import dtype_name

aten, ops = torch.ops.aten, torch.ops.thresher
R = relax.op

SEMANTICS: dict[Any, Converter] = {}
CPU_KERNELS: dict[Any, Converter] = {}
COMPLEX: dict[Any, Converter] = {}
#: Operators whose converters take tensors without elements.
TAKES_EMPTY = {aten.cat.default}


def converter_of(node: fx.Node, importer: Importer) -> Converter | None:
    """Return our converter for a call, or None where there is none."""
    values = [v for n in (node, *node.all_input_nodes) for v in tensors_of(n.meta.get("val"))]
    if any(v.is_complex() for v in values):
        return COMPLEX.get(node.target)
    if any(map(is_empty, values)) and node.target not in TAKES_EMPTY:
        return None
    if importer.machine is not None and node.target in CPU_KERNELS and fits_kernels(node):
        return CPU_KERNELS[node.target]
    return SEMANTICS.get(node.target)


def fits_kernels(node: fx.Node) -> bool:
    """Return whether the CPU kernels can compute a call: a float32 result, no size dynamic, no size of the result 0."""
    values = [n for n in (node, *node.all_input_nodes) if is_tensor(n)]
    static = all(isinstance(d, int) for n in values for d in shape_of(n))
    return static and is_tensor(node) and dtype_of(node) is torch.float32 and all(d > 0 for d in shape_of(node))


def _register(table: dict[Any, Converter], *targets: Any) -> Callable[[Converter], Converter]:
    def add(converter: Converter) -> Converter:
        table.update(dict.fromkeys(targets, converter))
        return converter

    return add


def complex_semantics(*targets: Any) -> Callable[[Converter], Converter]:
    """Register a converter of these operators for complex numbers, which it sees as pairs in a last dimension."""
    return _register(COMPLEX, *targets)


def semantics(*targets: Any) -> Callable[[Converter], Converter]:
    """Register a converter of these operators for every target: ``@semantics(aten.relu.default)``."""
    return _register(SEMANTICS, *targets)


def cpu_kernel(*targets: Any) -> Callable[[Converter], Converter]:
    """Register a converter of these operators for CPUs, used where :func:`fits_kernels` holds."""
    return _register(CPU_KERNELS, *targets)


def axis(n: int, name: str = "j") -> te.IterVar:
    """Return the axis of a reduction over ``n`` elements, with 64-bit indices."""
    start, end = (tirx.const(v, "int64") for v in (0, n))
    return te.reduce_axis((start, end), name=name)


def sizes(node: Any, start: int = 0) -> list[int]:
    """Return the sizes from dimension ``start`` on; raises NotImplementedError where one is dynamic."""
    shape = shape_of(node)[start:]
    if dynamic := [str(d) for d in shape if isinstance(d, torch.SymInt)]:
        raise NotImplementedError(
            f"dimension {dynamic[0]} is dynamic, and this operator is lowered for fixed ones only"
        )
    return [int(d) for d in shape]


def result_dtype(node: fx.Node) -> str:
    """Return the name of a node's dtype, as TVM spells it."""
    return dtype_name(dtype_of(node))


def cast(importer: Importer, value: Any, dtype: str) -> Any:
    """Return ``value`` (an expression or a number, or one over sizes) as an expression of ``dtype``."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value, dtype)
    if is_number(value):
        value = scalar_tensor(importer.builder, value)
    if dtype == "float32" and str(value.ty.dtype) == "bfloat16":
        compute = lambda t: te.compute(t.shape, lambda *i: widened(t(*i)), name="T_cast")  # noqa: E731
        return importer.emit_te("widened", compute, value, opaque=True)
    return value if str(value.ty.dtype) == dtype else importer.emit(R.astype(value, dtype))


def add_bias(importer: Importer, value: Any, bias: fx.Node | None, wide: int = 0) -> Any:
    """Add a bias [n] to the last dimension of ``value``; ``wide`` is that dimension's size where zeros follow its n columns."""
    if bias is None:
        return value
    if wide:
        array = importer.array(bias)
        vector = importer.weight(np.pad(array, (0, wide - len(array))), (bias, wide))
    else:
        vector = importer.value(bias)
    return importer.emit(R.add(value, vector))


def before_swap(node: fx.Node, first: int, second: int) -> fx.Node | None:
    """Return the node that ``node`` shows with two dimensions exchanged; None where it is something else."""
    order = list(range(len(shape_of(node))))
    order[first], order[second] = order[second], order[first]
    rank = len(order)
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:3]} == {first % rank, second % rank}:
        return node.args[0]
    if node.target is aten.permute.default and [d % rank for d in node.args[1]] == order:
        return node.args[0]
    return None


def pad(x: te.Tensor, before: Sequence[int], after: Sequence[int], fill: float) -> te.Tensor:
    """Return ``x`` with ``before`` and ``after`` elements of the value ``fill`` along each dimension."""
    padded = [d for d in range(len(x.shape)) if before[d] or after[d]]
    if not padded:
        return x

    def element(*i: Any) -> Any:
        index = [p - before[d] for d, p in enumerate(i)]
        inside = [index[d] >= 0 for d in padded if before[d]] + [index[d] < x.shape[d] for d in padded if after[d]]
        return tirx.if_then_else(te.all(*inside), x[tuple(index)], tirx.const(fill, x.dtype))

    return te.compute([s + b + a for s, b, a in zip(x.shape, before, after)], element, name="padded")


def accumulator(node: fx.Node) -> str:
    """Return the dtype that sums of products are computed in: float32 for half types, for others their own."""
    dtype = result_dtype(node)
    return "float32" if dtype in ("float16", "bfloat16") else dtype
