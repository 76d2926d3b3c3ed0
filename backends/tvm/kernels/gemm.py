"""Matrix products with a constant, packed right side: linear layers and convolutions as one implicit GEMM.

    C[m, n] = sum_k A(m, k) W[n, k]          rows m: tokens or output pixels; k: inputs, or (tap, channel) of a convolution

The weight is packed at compile time as ``[N/NR][K][NR]``, so the inner loop reads it front to back. A tile of MR x NR sums lives in
registers. The rows are padded to the tile by *clamping the index that is read*: the hot loop has no condition, only the store has.
What follows the product (bias, activation, threshold, residual add) is computed on the tile before it leaves the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import s_tir, te
from tvm.tirx import IndexMap

from thresher.backends.tvm.kernels.machine import Machine

BLOCK = "packed_gemm"  # the name by which the scheduler finds these kernels after fusion


@dataclass(frozen=True)
class Tile:
    """``rows`` x ``vectors * lanes`` sums in registers."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        return self.vectors * self.lanes


def choose_tile(m: int, n: int, k: int, machine: Machine) -> Tile:
    """The tile with the least estimated time, from what was measured (AVX2: 12 sums; AVX-512: 14 to 20 sums, two vectors wide).

    Padding rows and columns is paid for; few sums leave the multiply-add unit waiting; four vectors pay only while the panel of
    packed weights that a task streams (k x columns) stays in the L2 cache; one vector is bound by its loads.
    """
    best, best_cost = Tile(1, 1, machine.lanes), math.inf
    for vectors, bound in ((1, 0.82), (2, 1.0), (4, 1.0 if k * 4 * machine.lanes * 4 <= machine.cache // 2 else 0.8)):
        for rows in range(1, min(m, 12) + 1):
            if rows * vectors > machine.accumulators:
                continue
            busy = min(1.0, rows * vectors / 12) * bound * (0.96 if rows > 10 else 1.0)
            cost = -(-m // rows) * rows * -(-n // (vectors * machine.lanes)) * vectors / busy
            if cost < best_cost - 1e-9:
                best, best_cost = Tile(rows, vectors, machine.lanes), cost
    return best


def pack(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """[N, *taps] -> [N/NR, *taps, NR], padded with zeros."""
    n = weight.shape[0]
    blocks = -(-n // tile.columns)
    padded = np.zeros((blocks * tile.columns, *weight.shape[1:]), weight.dtype)
    padded[:n] = weight
    return np.ascontiguousarray(np.moveaxis(padded.reshape(blocks, tile.columns, *weight.shape[1:]), 1, -1))


def unravel(row: Any, shape: Sequence[int]) -> list[Any]:
    """The index in ``shape`` of the row-major number ``row``."""
    index: list[Any] = []
    for size in reversed(shape[1:]):
        index.insert(0, row % size)
        row = row // size
    return [row, *index]


def product(
    read: Callable[..., Any],
    packed: te.Tensor,
    taps: Sequence[int],
    rows: Sequence[int],
    n: int,
    tile: Tile,
) -> te.Tensor:
    """The computation. ``read(row index, *k)`` is A; ``rows`` is the shape of the row space, the result is ``[*rows, n]``."""
    m = math.prod(rows)
    axes = [te.reduce_axis((0, size), name=f"k{i}") for i, size in enumerate(taps)]
    columns = tile.columns
    full_m, full_n = -(-m // tile.rows) * tile.rows, packed.shape[0] * columns

    def element(i: Any, j: Any) -> Any:
        row = te.min(i, m - 1) if full_m != m else i
        return te.sum(read(row, *axes) * packed[(j // columns, *axes, j % columns)], axis=axes)

    sums = te.compute((full_m, full_n), element, name=BLOCK)

    def crop(*index: Any) -> Any:
        row = index[0]
        for size, i in zip(rows[1:], index[1:-1]):
            row = row * size + i
        return sums[row, index[-1]]

    return te.compute((*rows, n), crop, name="crop")


def schedule(sch: s_tir.Schedule, machine: Machine) -> None:
    """Tile, keep the sums in registers, compute the epilogue on the tile, and spread the tiles over the threads."""
    gemm = sch.get_sblock(BLOCK)
    full_m, full_n = (int(loop.extent) for loop in map(sch.get, sch.get_loops(gemm)[:2]))
    columns = int(sch.get(gemm).reads[1].source.shape[-1])
    epilogue = inline_epilogue(sch, gemm)
    flatten_rows(sch, epilogue)
    m = int(sch.get(sch.get_loops(epilogue)[0]).extent)
    n = int(sch.get(sch.get_loops(epilogue)[1]).extent)
    tile = choose_tile(m, n, math.prod(int(sch.get(loop).extent) for loop in sch.get_loops(gemm)[2:]), machine)
    assert tile.columns == columns, "the tile is chosen by the same rule when packing and when scheduling"
    i, j, *k = sch.get_loops(gemm)
    chunk = _chunk(full_m // tile.rows, full_n // columns, tile, math.prod(int(sch.get(x).extent) for x in k), machine)
    outer, middle, rows = sch.split(i, [None, chunk, tile.rows])
    blocks, vectors, lanes = sch.split(j, [None, tile.vectors, tile.lanes])
    depth = int(sch.get(k[-1]).extent)
    unroll = next(u for u in (4, 3, 2, 1) if depth % u == 0) if depth > 4 else depth
    deep, step = sch.split(k[-1], [None, unroll])
    sch.reorder(outer, blocks, middle, *k[:-1], deep, step, rows, vectors, lanes)
    sch.set_scope(gemm, 0, "local")
    sch.parallel(sch.fuse(outer, blocks))
    sch.reverse_compute_at(epilogue, middle)
    sch.vectorize(lanes)
    for loop in (rows, vectors, step):
        sch.unroll(loop)
    start = sch.decompose_reduction(gemm, (*k[:-1], deep)[0])
    *_, row, vector, lane = sch.get_loops(start)
    sch.vectorize(lane)
    sch.unroll(row)
    sch.unroll(vector)
    last = sch.get_loops(epilogue)[-1]
    if int(sch.get(last).extent) > tile.lanes:
        _, last = sch.split(last, [None, tile.lanes])
    sch.vectorize(last)


def _chunk(row_tiles: int, column_blocks: int, tile: Tile, depth: int, machine: Machine) -> int:
    """Row tiles per task: their part of A fits half the cache, and the tasks divide evenly over the threads."""
    fit = max(1, machine.cache // 2 // max(1, tile.rows * depth * 4))
    best, best_cost = row_tiles, math.inf
    for chunk in range(1, row_tiles + 1):
        tasks = -(-row_tiles // chunk) * column_blocks
        share = -(-tasks // machine.threads) * chunk  # row tiles the busiest thread computes, the padded ones counted
        cost = share + (0.05 * share * (chunk / fit - 1) if chunk > fit else 0) + 0.3 * (-(-row_tiles // chunk))
        if row_tiles % chunk:
            cost *= 1.02  # the last task carries a condition
        if cost < best_cost:
            best, best_cost = chunk, cost
    return best


def inline_epilogue(sch: s_tir.Schedule, anchor: Any) -> Any:
    """Inline all that follows ``anchor`` into the last block, which is returned."""
    block = anchor
    while consumers := sch.get_consumers(block):
        block = consumers[0]
    last = sch.get(block).name_hint
    for other in sch.get_child_blocks(sch.get_sblock("root")):
        name = sch.get(other).name_hint
        if name not in (last, sch.get(anchor).name_hint):
            sch.compute_inline(other)
    return sch.get_sblock(last)


def flatten_rows(sch: s_tir.Schedule, block: Any) -> None:
    """Give the block two iterators, (row, column), whatever the rank of what it writes."""
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(block)]

    def index(*i: Any) -> list[Any]:
        row = i[0]
        for size, part in zip(extents[1:-1], i[1:-1]):
            row = row * size + part
        return [row, i[-1]]

    if len(extents) != 2:
        sch.transform_block_layout(block, IndexMap.from_func(index, ndim=len(extents), index_dtype="int64"))
