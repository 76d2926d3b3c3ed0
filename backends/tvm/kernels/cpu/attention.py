"""Dense attention, fused: scores, softmax and the product with the values for a few rows at a time, nothing of size L x S in memory.

    out[l] = sum_s exp(c q_l k_s + mask_ls - top_l) v_s / sum_s exp(c q_l k_s + mask_ls - top_l)

The exact softmax of each row tile (no running rescale: the tile's scores fit the cache). Keys are packed so that the score product
reads them like a packed weight. (The tiling idea is FlashAttention's: Dao et al., 2022.)
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, te, tirx

from thresher.backends.tvm.cpu import STACK_BYTES, CpuInfo
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.backends.tvm.kernels.cpu.gemm import register_product, whole

PREFIX = "attention_"
ROWS = (8, 7, 6)  # that are computed together


def columns_of(machine: CpuInfo, size: int) -> int:
    """Return the columns of a product tile: two registers, or one where the row is short."""
    return machine.lanes * (2 if size > machine.lanes else 1)


def rows_of(machine: CpuInfo, rows: int) -> int:
    """Return the rows of a tile: many, but their sums fit the stack, and few are computed beyond the last."""
    fit = [r for r in ROWS if r * 2 * machine.lanes * 4 < STACK_BYTES]
    return min(fit, key=lambda r: whole(rows, r) * (1 + 0.02 * (ROWS[0] - r)))


def attention(
    q: te.Tensor, k: te.Tensor, v: te.Tensor, mask: te.Tensor | None, scale: float, causal: bool, machine: CpuInfo
) -> te.Tensor:
    """Compute q [B, H, L, E], k [B, H', S, E], v [B, H', S, F] -> [B, H, L, F]; H a multiple of H'; mask broadcasts to [B, H, L, S]."""
    batch, heads, rows, width = (int(d) for d in q.shape)
    length, out = int(k.shape[2]), int(v.shape[3])
    group = heads // int(k.shape[1])
    nr, nf = columns_of(machine, length), columns_of(machine, out)
    tile = rows_of(machine, rows)
    full_rows, full_length, full_out = (whole(a, b) for a, b in ((rows, tile), (length, nr), (out, nf)))
    low = tirx.const(-3.0e38, "float32")

    keys = te.compute(
        (batch, int(k.shape[1]), full_length // nr, width, nr),
        lambda b, h, s, e, i: k[b, h, te.min(s * nr + i, length - 1), e],
        name=f"{PREFIX}keys",
    )
    values = v
    if full_out != out:
        values = te.compute(
            (batch, int(k.shape[1]), length, full_out),
            lambda b, h, s, f: v[b, h, s, te.min(f, out - 1)],
            name=f"{PREFIX}values",
        )
    e = te.reduce_axis((0, width), name="e")
    products = te.compute(
        (batch, heads, full_rows, full_length),
        lambda b, h, i, s: te.sum(q[b, h, te.min(i, rows - 1), e] * keys[b, h // group, s // nr, e, s % nr], axis=e),
        name=f"{PREFIX}products",
    )

    def score(b: Any, h: Any, i: Any, s: Any) -> Any:
        value = products[b, h, i, s] * tirx.const(scale, "float32")
        if mask is not None:
            index = [
                tirx.const(0, "int64") if int(d) == 1 else x
                for d, x in zip(mask.shape, (b, h, te.min(i, rows - 1), te.min(s, length - 1)))
            ]
            at = mask[tuple(index)]
            value = tirx.Select(at, value, low) if mask.dtype == "bool" else te.max(value + at, low)
        if causal:
            value = tirx.Select(s <= i, value, low)
        return tirx.Select(s < length, value, low) if full_length != length else value

    scores = te.compute((batch, heads, full_rows, full_length), score, name=f"{PREFIX}scores")
    lanes = machine.lanes
    part, lane = te.reduce_axis((0, full_length // lanes), name="p"), te.reduce_axis((0, lanes), name="j")
    tops = te.compute(
        (batch, heads, full_rows, lanes),
        lambda b, h, i, j: te.max(scores[b, h, i, part * lanes + j], axis=part),
        name=f"{PREFIX}top_parts",
    )
    top = te.compute(
        (batch, heads, full_rows), lambda b, h, i: te.max(tops[b, h, i, lane], axis=lane), name=f"{PREFIX}top"
    )
    weights = te.compute(
        (batch, heads, full_rows, full_length),
        lambda b, h, i, s: elementwise.named(scores[b, h, i, s] - top[b, h, i], elementwise.short_exp),
        name=f"{PREFIX}weights",
    )
    part2, lane2 = te.reduce_axis((0, full_length // lanes), name="p"), te.reduce_axis((0, lanes), name="j")
    sums = te.compute(
        (batch, heads, full_rows, lanes),
        lambda b, h, i, j: te.sum(weights[b, h, i, part2 * lanes + j], axis=part2),
        name=f"{PREFIX}sum_parts",
    )
    total = te.compute(
        (batch, heads, full_rows), lambda b, h, i: te.sum(sums[b, h, i, lane2], axis=lane2), name=f"{PREFIX}sum"
    )
    s2 = te.reduce_axis((0, length), name="s")
    mixed = te.compute(
        (batch, heads, full_rows, full_out),
        lambda b, h, i, f: te.sum(weights[b, h, i, s2] * values[b, h // group, s2, f], axis=s2),
        name=f"{PREFIX}mixed",
    )
    inverse = te.compute(
        (batch, heads, full_rows),
        lambda b, h, i: tirx.Select(
            top[b, h, i] > low, 1.0 / total[b, h, i], tirx.const(0.0, "float32")
        ),  # all masked: 0
        name=f"{PREFIX}inverse",
    )
    return te.compute(
        (batch, heads, rows, out), lambda b, h, i, f: mixed[b, h, i, f] * inverse[b, h, i], name=f"{PREFIX}out"
    )


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Spread row tiles of all heads over the threads; within one, both products keep their sums in registers."""
    names = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    stages = {name.removeprefix(PREFIX): b for name, b in names.items() if name.startswith(PREFIX)}
    last = list(names.values())[-1]
    for name, block in names.items():
        if not name.startswith(PREFIX) and block is not last:
            sch.compute_inline(block)
    if stages["out"] is not last:
        sch.compute_inline(stages["out"])
    for packed in ("keys", "values"):
        if packed in stages:
            loops = sch.get_loops(stages[packed])
            sch.parallel(sch.fuse(*loops[:3]))
    b, h, i, f = sch.get_loops(last)
    i, row = sch.split(i, [None, rows_of(machine, int(sch.get(i).extent))])
    width = int(sch.get(stages["mixed"]).writes[0].source.shape[-1])
    columns = columns_of(machine, width)
    fo, fi = sch.split(f, [None, columns])
    sch.reorder(b, h, i, fo, row, fi)
    tile = sch.fuse(b, h, i)
    sch.parallel(tile)
    sch.compute_at(stages["mixed"], fo, preserve_unit_loops=True)
    register_product(sch, stages["mixed"], machine.lanes)
    for name in ("inverse", "sum", "sum_parts", "weights", "top", "top_parts", "scores"):
        sch.compute_at(stages[name], tile, preserve_unit_loops=True)
    for name in ("sum_parts", "top_parts"):
        *_, lane, part = sch.get_loops(stages[name])
        sch.reorder(part, lane)
        sch.vectorize(lane)
        sch.vectorize(sch.get_loops(sch.decompose_reduction(stages[name], part))[-1])
    _, lane = sch.split(sch.get_loops(stages["weights"])[-1], [None, machine.lanes])
    sch.vectorize(lane)
    *_, row, s = sch.get_loops(stages["scores"])
    so, si = sch.split(s, [None, int(sch.get(stages["keys"]).writes[0].source.shape[-1])])
    sch.reorder(so, row, si)
    sch.compute_at(stages["products"], so, preserve_unit_loops=True)
    register_product(sch, stages["products"], machine.lanes)
    _, lane = sch.split(si, [None, machine.lanes])
    sch.vectorize(lane)
    _, lane = sch.split(fi, [None, machine.lanes])
    sch.vectorize(lane)
