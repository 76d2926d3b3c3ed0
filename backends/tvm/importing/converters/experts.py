"""Products of which each row takes the weight of its expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    accumulator,
    axis,
    cast,
    cpu_kernel,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import expert_linear as kernels


@cpu_kernel(ops.expert_linear.default)
def expert_linear_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute x [..., K] and experts [...] with weight [E, N, K] -> [..., N], the rows grouped by expert."""
    x, experts, weight = node.args[:3]
    bias = argument(node, 3, "bias")
    if not importer.is_constant(weight):
        return expert_linear(importer, node)
    (*lead, n), (count, _, k) = sizes(node), sizes(weight)
    rows = math.prod(lead)
    # a token with several experts is given once
    sharing = lead[-1] if lead and sizes(x)[:-1] == [*lead[:-1], 1] else 1
    inputs = [_flat(importer, x, [*(lead if sharing == 1 else sizes(x)[:-1]), k], [rows // sharing, k])]
    inputs.append(cast(importer, _flat(importer, experts, lead, [rows]), "int64"))
    inputs.append(importer.weight(kernels.packed(importer.array(weight), importer.cpu), (weight, "by expert")))
    inputs += [] if bias is None else [importer.value(bias)]
    problem = kernels.Problem(rows, sharing, count, n, k, bias is not None)
    function = importer.builder.add_func(kernels.kernel(problem, importer.cpu), "expert_linear")
    out = importer.emit(relax.call_tir(function, inputs, relax.TensorType([rows, n], "float32")))
    return importer.emit(R.reshape(out, [*lead, n]))


def _flat(importer: Importer, node: fx.Node, whole: list[int], flat: list[int]) -> Any:
    """Return a value, broadcast to the shape ``whole``, in the shape ``flat``."""
    value = importer.value(node)
    if sizes(node) != whole:
        value = importer.emit(R.broadcast_to(value, whole))
    return value if whole == flat else importer.emit(R.reshape(value, flat))


@semantics(ops.expert_linear.default)
def expert_linear(importer: Importer, node: fx.Node) -> Any:
    """Compute each row with the weight that it takes, which is read where it lies; half types are summed in float32."""
    x, experts, weight = node.args[:3]
    bias = argument(node, 3, "bias")
    wide = accumulator(node)

    def chosen(experts: te.Tensor, table: te.Tensor, row: Sequence[Any], *index: Any) -> Any:
        """Return the row's expert's element of a weight, 0 where it has none."""
        expert = _at(experts, row)
        element = table[(te.max(te.min(expert, table.shape[0] - 1), tirx.const(0, "int64")), *index)]
        inside = tirx.all(expert >= 0, expert < table.shape[0])
        return tirx.Select(inside, tirx.Cast(wide, element), tirx.const(0, wide))

    def product(x: te.Tensor, experts: te.Tensor, weight: te.Tensor) -> te.Tensor:
        rank = max(len(x.shape) - 1, len(experts.shape))
        one = tirx.const(1, "int64")
        shapes = [[*[one] * (rank - len(shape)), *shape] for shape in (x.shape[:-1], experts.shape)]
        lead = [b if _single(a) else a for a, b in zip(*shapes)]
        j = axis(int(weight.shape[2]))

        def element(*i: Any) -> Any:
            value = tirx.Cast(wide, _at(x, i[:-1], j))
            return te.sum(value * chosen(experts, weight, i[:-1], i[-1], j), axis=j)

        return te.compute((*lead, weight.shape[1]), element, name="expert_linear")

    def biased(value: te.Tensor, experts: te.Tensor, bias: te.Tensor) -> te.Tensor:
        return te.compute(value.shape, lambda *i: value(*i) + chosen(experts, bias, i[:-1], i[-1]), name="expert_bias")

    taken = cast(importer, importer.value(experts), "int64")
    value = importer.emit_te("expert_linear", product, importer.value(x), taken, importer.value(weight))
    if bias is not None:
        value = importer.emit_te("expert_bias", biased, value, taken, importer.value(bias))
    return cast(importer, value, result_dtype(node))


def _at(x: te.Tensor, row: Sequence[Any], *last: Any) -> Any:
    """Return the element of a value, whose leading dimensions are broadcast to those of ``row``."""
    lead = x.shape[: len(x.shape) - len(last)]
    index = [tirx.const(0, "int64") if _single(size) else i for size, i in zip(lead, row[len(row) - len(lead) :])]
    return x[(*index, *last)]


def _single(size: Any) -> bool:
    return isinstance(size, (int, tirx.IntImm)) and int(size) == 1
