"""Attention: fused on the CPU, composed elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    aten,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import attention
from thresher.program import shape_of


@cpu_kernel(aten.scaled_dot_product_attention.default)
def attention_kernel(importer: Importer, node: fx.Node) -> Any:
    """Fused attention for three and four dimensions."""
    q, k, v = node.args[:3]
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    shapes = [sizes(n) for n in (q, k, v)]
    rank = len(shapes[0])
    if rank not in (3, 4) or any(len(s) != rank for s in shapes) or any(s[:-3] != shapes[0][:-3] for s in shapes):
        return attention_composed(importer, node)
    if shapes[0][-3] % shapes[1][-3] or (rank == 3 and shapes[0][0] != shapes[1][0]):
        return attention_composed(importer, node)
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(shapes[0][-1]) if scale is None else float(scale)
    values = [importer.value(n) for n in (q, k, v)]
    if rank == 3:
        values = [importer.emit(R.reshape(t, (1, *s))) for t, s in zip(values, shapes)]
    m = None
    if mask is not None:
        m = importer.value(mask)
        m = importer.emit(R.reshape(m, [1] * (4 - len(shape_of(mask))) + sizes(mask)))
        m = m if str(m.ty.dtype) == "bool" else cast(importer, m, "float32")
    machine = importer.cpu
    out = importer.emit_te(
        "attention", lambda q, k, v, m: attention.attention(q, k, v, m, scale, causal, machine), *values, m
    )
    return out if rank == 4 else importer.emit(R.reshape(out, sizes(node)))


@semantics(aten.scaled_dot_product_attention.default)
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
