"""Products of two computed values, a batch of them:  C[b, m, n] = sum_k A[b, m, k] B[b, k, n].

As for a constant right side (``gemm``), but the packing ``[N/NR][K][NR]`` of B happens at run time, before the product; it costs one pass
over B for M passes of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import s_tir, te, tirx
from tvm.tirx import IndexMap

from thresher.backends.tvm.kernels.gemm import Tile, choose_tile, inline_epilogue
from thresher.backends.tvm.kernels.machine import Machine

PREFIX = "batched_"
PACKED, SUMS = f"{PREFIX}packed", f"{PREFIX}sums"
LEAST = 4  # rows: with fewer, packing costs as much as the product


def product(
    lead: Sequence[int], m: int, n: int, k: int, left: Callable[..., Any], right: Callable[..., Any], machine: Machine
) -> te.Tensor:
    """``left(*batch, m, k)`` times ``right(*batch, k, n)``, for the batch shape ``lead`` -> ``[*lead, m, n]``."""
    tile = choose_tile(m, n, k, machine)
    nr = tile.columns
    full_m, full_n = -(-m // tile.rows) * tile.rows, -(-n // nr) * nr
    packed = te.compute(
        (*lead, full_n // nr, k, nr),
        lambda *i: right(*i[:-3], i[-2], te.min(i[-3] * nr + i[-1], n - 1) if full_n != n else i[-3] * nr + i[-1]),
        name=PACKED,
    )
    over = te.reduce_axis((0, k), name="k")
    sums = te.compute(
        (*lead, full_m, full_n),
        lambda *i: te.sum(
            left(*i[:-2], te.min(i[-2], m - 1) if full_m != m else i[-2], over)
            * packed[(*i[:-2], i[-1] // nr, over, i[-1] % nr)],
            axis=over,
        ),
        name=SUMS,
    )
    return te.compute((*lead, m, n), lambda *i: sums[i], name=f"{PREFIX}out")


def schedule(sch: s_tir.Schedule, machine: Machine) -> None:
    """Row tiles of all products over the threads; a tile's sums stay in registers, what follows is computed on it."""
    packed, sums = sch.get_sblock(PACKED), sch.get_sblock(SUMS)
    epilogue = inline_epilogue(sch, sums, keep=frozenset((PACKED,)))
    rank = len(sch.get(sums).writes[0].source.shape)
    k, nr = (int(d) for d in sch.get(packed).writes[0].source.shape[-2:])
    _by_rows(sch, epilogue)
    _, m, n = (int(sch.get(loop).extent) for loop in sch.get_loops(epilogue))
    tile = choose_tile(m, n, k, machine)
    assert tile.columns == nr, "the tile is chosen by the same rule when packing and when scheduling"
    first, *_ = sch.get_loops(packed)
    blocks = sch.get_loops(packed)[: rank - 1]
    sch.parallel(sch.fuse(*blocks) if len(blocks) > 1 else first)
    b, i, j = sch.get_loops(epilogue)
    i, row = sch.split(i, [None, tile.rows])
    j, column = sch.split(j, [None, nr])
    sch.reorder(b, i, j, row, column)
    task = sch.fuse(b, i)
    sch.parallel(task)
    sch.compute_at(sums, j, preserve_unit_loops=True)
    _registers(sch, sums, tile)
    if n % tile.lanes == 0:
        _, lane = sch.split(column, [None, tile.lanes])
        sch.vectorize(lane)


def _by_rows(sch: s_tir.Schedule, block: Any) -> None:
    """Give the block three iterators: (batch, row, column)."""
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(block)]

    def index(*i: Any) -> list[Any]:
        batch: Any = tirx.const(0, "int64")
        for size, part in zip(extents[:-2], i[:-2]):
            batch = batch * size + part
        return [batch, i[-2], i[-1]]

    if len(extents) != 3:
        sch.transform_block_layout(block, IndexMap.from_func(index, ndim=len(extents), index_dtype="int64"))


def _registers(sch: s_tir.Schedule, sums: Any, tile: Tile) -> None:
    sch.set_scope(sums, 0, "local")
    *_, row, column, k = sch.get_loops(sums)
    vector, lane = sch.split(column, [None, tile.lanes])
    size = int(sch.get(k).extent)
    k, step = sch.split(k, [None, next(u for u in (4, 2, 1) if size % u == 0)])
    sch.reorder(k, step, row, vector, lane)
    sch.vectorize(lane)
    for loop in (row, vector, step):
        sch.unroll(loop)
    *_, row, vector, lane = sch.get_loops(sch.decompose_reduction(sums, k))
    sch.vectorize(lane)
    sch.unroll(row)
    sch.unroll(vector)
