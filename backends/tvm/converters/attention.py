"""Attention: fused on the CPU and, in half precision, on tensor cores; composed elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    aten,
    before_swap,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import attention, flash_attention
from thresher.program import shape_of


@dataclass(frozen=True)
class Call:
    """The arguments of one attention, the shapes of q, k and v as [B, H, L, E]; ``mask`` has four dimensions and may be None."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    shapes: tuple[list[int], list[int], list[int]]

    @staticmethod
    def of(node: fx.Node) -> Call | None:
        """None where the dimensions are dynamic, or not three or four, or broadcast."""
        q, k, v = node.args[:3]
        rank = len(shape_of(q))
        if rank not in (3, 4) or any(not isinstance(d, int) for n in (q, k, v) for d in shape_of(n)):
            return None
        shapes = [sizes(n) for n in (q, k, v)]
        if any(len(s) != rank for s in shapes) or any(s[:-3] != shapes[0][:-3] for s in shapes):
            return None
        if shapes[0][-3] % shapes[1][-3] or (rank == 3 and shapes[0][0] != shapes[1][0]):
            return None
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(shapes[0][-1]) if scale is None else float(scale)
        causal, mask = bool(argument(node, 5, "is_causal", False)), argument(node, 3, "attn_mask")
        four = [s if rank == 4 else [1, *s] for s in shapes]
        return Call(q, k, v, mask, causal, scale, (four[0], four[1], four[2]))

    def values(self, importer: Importer) -> list[Any]:
        """q, k and v with four dimensions."""
        given = [importer.value(n) for n in (self.q, self.k, self.v)]
        if len(shape_of(self.q)) == 4:
            return given
        return [importer.emit(R.reshape(t, s)) for t, s in zip(given, self.shapes)]

    def mask_value(self, importer: Importer) -> Any:
        """The mask with four dimensions, boolean or float32."""
        if self.mask is None:
            return None
        m = importer.value(self.mask)
        m = importer.emit(R.reshape(m, self.mask_shape))
        return m if str(m.ty.dtype) == "bool" else cast(importer, m, "float32")

    @property
    def mask_shape(self) -> list[int]:
        assert self.mask is not None
        return [1] * (4 - len(shape_of(self.mask))) + sizes(self.mask)


@cpu_kernel(aten.scaled_dot_product_attention.default)
def attention_kernel(importer: Importer, node: fx.Node) -> Any:
    """Fused attention for three and four dimensions."""
    call, machine = Call.of(node), importer.cpu
    if call is None:
        return attention_composed(importer, node)
    out = importer.emit_te(
        "attention",
        lambda q, k, v, m: attention.attention(q, k, v, m, call.scale, call.causal, machine),
        *call.values(importer),
        call.mask_value(importer),
    )
    return out if len(shape_of(node)) == 4 else importer.emit(R.reshape(out, sizes(node)))


@semantics(aten.scaled_dot_product_attention.default)
def attention_elsewhere(importer: Importer, node: fx.Node) -> Any:
    """In half precision on a GPU with tensor cores one kernel; composed for everything else."""
    call, dtype = Call.of(node), result_dtype(node)
    if call is None or not flash_attention.fits(importer.arch, dtype, call.shapes):
        return attention_composed(importer, node)
    values, operands = [], []
    for given, value, shape in zip((call.q, call.k, call.v), call.values(importer), call.shapes):
        source = before_swap(given, 1, 2) if len(shape_of(given)) == 4 else None  # stored as [B, L, H, E]
        values.append(value if source is None else importer.value(source))
        operands.append(flash_attention.Operand.of(shape, source is not None))
    mask, kind, place = call.mask_value(importer), "NONE", None
    if mask is not None:
        kind = "BOOLEAN" if str(mask.ty.dtype) == "bool" else "ADDED"
        place = flash_attention.Operand.mask(call.mask_shape)
    q, k, v = operands
    problem = flash_attention.Problem(q, k, v, place, kind, call.causal, call.scale, dtype)
    compute = partial(flash_attention.attention, problem)
    out = importer.emit_te("flash_attention", compute, *values, mask, scheduled=True)
    return out if len(shape_of(node)) == 4 else importer.emit(R.reshape(out, sizes(node)))


def attention_composed(importer: Importer, node: fx.Node) -> Any:
    """softmax(scale q k^T + mask) v, with grouped heads, any rank, boolean or additive masks; softmax in float32."""
    q, k, v = (importer.value(n) for n in node.args[:3])
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    rank, shape = len(shape_of(node)), shape_of(node.args[0])
    heads, kv_heads = (shape_of(n)[-3] if rank > 2 else 1 for n in node.args[:2])
    if argument(node, 7, "enable_gqa", False) and heads != kv_heads:
        k, v = (importer.emit(R.repeat(t, heads // kv_heads, rank - 3)) for t in (k, v))
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(int(shape[-1])) if scale is None else float(scale)
    dtype = result_dtype(node)
    order = [*range(rank - 2), rank - 1, rank - 2]
    wide = "float64" if dtype == "float64" else "float32"
    scores = importer.emit(R.matmul(q, importer.emit(R.permute_dims(k, order)), out_dtype=wide))
    scores = importer.emit(R.multiply(scores, relax.const(scale, wide)))
    low = relax.const(float(np.finfo(wide).min) / 2, wide)
    if mask is not None:
        m = importer.value(mask)
        if str(m.ty.dtype) == "bool":
            scores = importer.emit(R.where(m, scores, low))
        else:
            scores = importer.emit(R.add(scores, cast(importer, m, wide)))
    if causal:
        length, keys = (int(shape_of(n)[-2]) for n in node.args[:2])
        below = np.tril(np.ones((length, keys), bool))
        scores = importer.emit(R.where(importer.weight(below, ("causal", length, keys)), scores, low))
    weights = cast(importer, importer.emit(R.nn.softmax(scores, -1)), dtype)
    return cast(importer, importer.emit(R.matmul(weights, v, out_dtype=wide)), dtype)
