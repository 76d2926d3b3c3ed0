"""Prove from the operators that made a value that it is never negative."""

from __future__ import annotations

import torch
from torch import fx

from thresher.ir.program import Program

aten = torch.ops.aten
ALWAYS = (
    aten.relu.default, aten.abs.default, aten.exp.default, aten.sigmoid.default, aten.softplus.default, aten.square.default,
    aten.sqrt.default, aten.linalg_vector_norm.default, aten.softmax.int, aten._softmax.default, aten.cosh.default, aten.var.correction,
)  # fmt: skip
IF_ALL_ARE = (
    aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default, aten.minimum.default, aten.mean.dim, aten.sum.dim_IntList,
    aten.amax.default, aten.amin.default, aten.reshape.default, aten.expand.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.cat.default, aten._to_copy.default, aten.where.self,
    aten.reciprocal.default, aten.gather.default, aten.index_select.default,
)  # fmt: skip


def nonnegative(program: Program, node: fx.Node) -> bool:
    """Return whether no element of ``node`` is negative, NaN aside; False where that cannot be proven."""
    value = program.constant(node)
    if value is not None:
        return bool((value >= 0).all())
    if node.target in ALWAYS:
        return True
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] % 2 == 0
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        bounds = [b for b in node.args[1:] if b is not None]
        return node.args[1] is not None and all(isinstance(b, (int, float)) and b >= 0 for b in bounds)
    if node.target in IF_ALL_ARE and node.kwargs.get("alpha", 1) >= 0:
        skipped = 1 if node.target is aten.where.self else 0
        numbers = node.args[1:] if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor) else ()
        tensors = [n for n in node.all_input_nodes if n is not (node.args[0] if skipped else None)]
        return all(nonnegative(program, n) for n in tensors) and all(
            v >= 0 for v in numbers if isinstance(v, (int, float))
        )
    return False
