"""The two tables of converters and what converters share.

``SEMANTICS`` holds for every target; ``CPU_KERNELS`` come first on the CPU, for float32 and static shapes. A converter is
``f(importer, node) -> expression``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from tvm import relax, te, tirx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.backends.tvm.importing.importer import Importer
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.runtime.tensor_spec import dtype_name

aten, ops = torch.ops.aten, torch.ops.thresher


R = relax.op


Converter = Callable[[Importer, fx.Node], Any]


SEMANTICS: dict[Any, Converter] = {}


CPU_KERNELS: dict[Any, Converter] = {}


def converter_of(node: fx.Node, importer: Importer) -> Converter | None:
    """Our converter for a call, or None where the stock one is right."""
    if importer.machine is not None and node.target in CPU_KERNELS and fits_kernels(node):
        return CPU_KERNELS[node.target]
    return SEMANTICS.get(node.target)


def fits_kernels(node: fx.Node) -> bool:
    values = [n for n in (node, *node.all_input_nodes) if is_tensor(n)]
    static = all(isinstance(d, int) for n in values for d in shape_of(n))
    return static and is_tensor(node) and dtype_of(node) is torch.float32 and all(d > 0 for d in shape_of(node))


def _register(table: dict[Any, Converter], *targets: Any) -> Callable[[Converter], Converter]:
    def add(converter: Converter) -> Converter:
        table.update(dict.fromkeys(targets, converter))
        return converter

    return add


def semantics(*targets: Any) -> Callable[[Converter], Converter]:
    return _register(SEMANTICS, *targets)


def cpu_kernel(*targets: Any) -> Callable[[Converter], Converter]:
    return _register(CPU_KERNELS, *targets)


def axis(n: int, name: str = "j") -> te.IterVar:
    """What a sum runs over."""
    start, end = (tirx.const(v, "int64") for v in (0, n))
    return te.reduce_axis((start, end), name=name)


def sizes(node: Any, start: int = 0) -> list[int]:
    """The sizes from dimension ``start`` on, which must be static."""
    found = shape_of(node)[start:]
    if dynamic := [str(d) for d in found if isinstance(d, torch.SymInt)]:
        raise NotImplementedError(
            f"dimension {dynamic[0]} is dynamic, and this operator is lowered for fixed ones only"
        )
    return [int(d) for d in found]


def result_dtype(node: fx.Node) -> str:
    return dtype_name(dtype_of(node))


def cast(importer: Importer, value: Any, dtype: str) -> Any:
    """``value`` (an expression or a number) as an expression of ``dtype``."""
    if isinstance(value, (bool, int, float)):
        return relax.const(value, dtype)
    return value if str(value.ty.dtype) == dtype else importer.emit(R.astype(value, dtype))


def add_bias(importer: Importer, value: Any, bias: fx.Node | None, wide: int = 0) -> Any:
    """``wide``: the width of ``value`` where it has zeros behind its columns."""
    if bias is None:
        return value
    if wide:
        array = importer.array(bias)
        vector = importer.weight(np.pad(array, (0, wide - len(array))), (bias, wide))
    else:
        vector = importer.value(bias)
    return importer.emit(R.add(value, vector))


def before_swap(node: fx.Node, first: int, second: int) -> fx.Node | None:
    """What ``node`` shows with these two dimensions exchanged; None where it is something else."""
    order = list(range(len(shape_of(node))))
    order[first], order[second] = order[second], order[first]
    rank = len(order)
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:3]} == {first % rank, second % rank}:
        return node.args[0]
    if node.target is aten.permute.default and [d % rank for d in node.args[1]] == order:
        return node.args[0]
    return None


def pad(x: te.Tensor, before: Sequence[int], after: Sequence[int], fill: float) -> te.Tensor:
    """``fill`` around ``x``."""
    padded = [d for d in range(len(x.shape)) if before[d] or after[d]]
    if not padded:
        return x

    def element(*i: Any) -> Any:
        place = [p - before[d] for d, p in enumerate(i)]
        inside = [place[d] >= 0 for d in padded if before[d]] + [place[d] < x.shape[d] for d in padded if after[d]]
        return tirx.if_then_else(te.all(*inside), x[tuple(place)], tirx.const(fill, x.dtype))

    return te.compute([s + b + a for s, b, a in zip(x.shape, before, after)], element, name="padded")


def accumulator(node: fx.Node) -> str:
    """Products of half types are summed in float32, everything else in its own type."""
    dtype = result_dtype(node)
    return "float32" if dtype in ("float16", "bfloat16") else dtype
