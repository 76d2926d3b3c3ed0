"""Blocks of keys that are left out because of their small weights, for targets without a kernel that skips them."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from thresher.backends.tvm.importing.converters.registry import axis
from thresher.backends.tvm.importing.importer import Importer


def large_blocks(importer: Importer, skip: float, block_q: int, block_k: int, scores: Any) -> Any:
    """Return a mask of the masked scores [B, H, L, S]: the blocks that are not ``negligible`` (thresher.ops.sparse_attention)."""
    batch, heads, rows, keys = (int(d) for d in scores.ty.shape)
    lists, columns = -(-rows // block_q), -(-keys // block_k)

    def tops(x: te.Tensor) -> te.Tensor:
        s, low = axis(block_k, "s"), tirx.min_value(x.dtype)

        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            key = j * block_k + s
            return te.max(tirx.Select(key < keys, x[b, h, i, te.min(key, keys - 1)], low), axis=s)

        return te.compute((batch, heads, rows, columns), one, name="tops")

    def so_far(x: te.Tensor) -> te.Tensor:
        other, low = axis(columns, "other"), tirx.min_value(x.dtype)
        return te.compute(
            x.shape, lambda *i: te.max(tirx.Select(other <= i[3], x[(*i[:3], other)], low), axis=other), name="so_far"
        )

    def under(x: te.Tensor, top: te.Tensor) -> te.Tensor:
        """How far a block is under the top of a row so far, at most; masked rows do not count."""
        r, low = axis(block_q, "r"), tirx.min_value(x.dtype)

        def one(b: Any, h: Any, i: Any, j: Any) -> Any:
            row = te.min(i * block_q + r, rows - 1)
            counts = tirx.all(i * block_q + r < rows, x[b, h, row, j] > low / 4)
            return te.max(tirx.Select(counts, x[b, h, row, j] - top[b, h, row, j], low), axis=r)

        return te.compute((batch, heads, lists, columns), one, name="under")

    def large(x: te.Tensor) -> te.Tensor:
        limit = tirx.const(-skip, x.dtype)
        return te.compute(
            scores.ty.shape, lambda b, h, i, j: x[b, h, i // block_q, j // block_k] >= limit, name="large"
        )

    maxima = importer.emit_te("tops", tops, scores)
    return importer.emit_te(
        "large", large, importer.emit_te("under", under, maxima, importer.emit_te("so_far", so_far, maxima))
    )
