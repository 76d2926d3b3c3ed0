"""Matrix products with a constant, packed right side: linear layers and convolutions as one implicit GEMM.

    C[m, n] = sum_k A(m, k) W[n, k]          rows m: tokens or output pixels; k: inputs, or (tap, channel) of a convolution

The weight is packed at compile time as ``[N/NR][K][NR]``, so the inner loop reads it front to back. A tile of MR x NR sums lives in
registers. The rows are padded to the tile by *clamping the index that is read*: the hot loop has no condition, only the store has.
What follows the product (bias, activation, threshold, residual add) is computed on the tile before it leaves the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from tvm import s_tir, te

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu.epilogue import flatten_rows, inline_epilogue
from thresher.backends.tvm.kernels.cpu.registers import register_part
from thresher.backends.tvm.kernels.loop_marks import cut, idle

BLOCK, ADDED = "packed_gemm", "packed_gemm_sum"  # the names by which the scheduler finds these kernels after fusion
SLICE = 512  # depth of a slice of a long sum
MAX_SERIAL_PRODUCTS = 1 << 16  # multiply-adds that are done before another thread has woken up


@dataclass(frozen=True)
class Tile:
    """A tile of ``rows`` x ``vectors * lanes`` sums in registers."""

    rows: int
    vectors: int
    lanes: int

    @property
    def columns(self) -> int:
        """The columns of the tile."""
        return self.vectors * self.lanes


@dataclass(frozen=True)
class Plan:
    """A way to compute a product: the tile, the row and column tiles of a task, and whether a deep sum is cut into slices."""

    rows: int
    vectors: int
    row_tiles: int
    column_tiles: int
    sliced: bool

    def tile(self, machine: CpuInfo) -> Tile:
        """Return the tile for the registers of a CPU."""
        return Tile(self.rows, self.vectors, machine.lanes)


def tiles(m: int, n: int, k: int, machine: CpuInfo, line: int = 0) -> list[Tile]:
    """Return all tiles that fit the registers, by estimated time, from what was measured (AVX2: 12 sums, two or three vectors wide;
    AVX-512: 14 to 20 sums, two vectors wide).

    Padding rows and columns is paid for; few sums leave the multiply-add unit waiting; sums, a row of the weight and an element of A
    that do not fit the registers together spill; four vectors pay only while the panel of packed weights that a task streams
    (k x columns) stays in the L2 cache; one vector is bound by its loads. Where a window reads around its row, the rows of a tile
    should lie in one ``line`` of the image: then one address serves them all.
    """
    streams = min(k, SLICE) * 4 * machine.lanes * 4 <= machine.cache // 2
    widths = {1: 0.82, 2: 1.0, 3: 0.99} if machine.registers == 16 else {1: 0.82, 2: 1.0, 4: 1.0 if streams else 0.8}

    def cost(tile: Tile) -> float:
        sums = tile.rows * tile.vectors
        busy = min(1.0, 1 - 0.015 * (12 - sums)) if sums >= 8 else 0.94 - 0.075 * (8 - sums)
        busy *= widths[tile.vectors] * (0.96 if tile.rows > 10 else 1.0) * (0.92 if line % tile.rows else 1.0)
        return round(-(-m // tile.rows) * tile.rows * -(-n // tile.columns) * tile.vectors / busy, 6)

    fit = [
        Tile(rows, vectors, machine.lanes)
        for vectors in widths
        for rows in range(1, min(m, 12) + 1)
        if rows * vectors <= machine.accumulators and (rows + 1) * vectors + 1 <= machine.registers
    ]
    return sorted(fit, key=cost)


def plans(
    m: int,
    n: int,
    taps: Sequence[int],
    machine: CpuInfo,
    limit: int = 1,
    line: int = 0,
    vectors: int = 0,
    part: int = 0,
) -> list[Plan]:
    """Return the ``limit`` most promising plans for ``[m, k] x [k, n]`` with k = the product of ``taps``; the first is the estimate's
    choice. ``line``: as for :func:`tiles`; ``vectors``: only tiles so wide; ``part``: only tiles of which whole ones make so many columns.
    """
    depth = math.prod(taps)
    sliced = m > 1 and bool(slices_of(taps)[0])  # a single row reads the weight once anyway
    ways = [sliced, not sliced] if m > 1 and slices_of(taps, SLICE)[0] and limit > 1 else [sliced]
    estimates: list[tuple[int, int, int, Plan]] = []
    fit = [t for t in tiles(m, n, depth, machine, line) if vectors in (0, t.vectors) and part % t.columns == 0]
    for t, tile in enumerate(fit[: 1 if limit == 1 else 6]):
        for w, slices in enumerate(ways):
            grid = -(-m // tile.rows), -(-n // tile.columns)
            tasks = _slice_tasks(*grid, tile, SLICE, machine) if slices else _whole_tasks(*grid, tile, depth, machine)
            for i, task in enumerate(tasks[: 1 if limit == 1 else 4]):
                estimates.append((t + i + w, t, i, Plan(tile.rows, tile.vectors, *task, slices)))
    return [plan for *_, plan in sorted(estimates, key=lambda f: f[:3])[:limit]]


def pack(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """Return [N, *taps] as [N/NR, *taps, NR], padded with zeros."""
    n = weight.shape[0]
    blocks = -(-n // tile.columns)
    padded = np.zeros((blocks * tile.columns, *weight.shape[1:]), weight.dtype)
    padded[:n] = weight
    return np.ascontiguousarray(np.moveaxis(padded.reshape(blocks, tile.columns, *weight.shape[1:]), 1, -1))


def unravel(row: Any, shape: Sequence[int]) -> list[Any]:
    """Return the index in ``shape`` of the row-major number ``row``."""
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
    plan: Plan,
    wide: int = 0,
    groups: int = 0,
) -> te.Tensor:
    """Compute the product. ``read(row index, *k)`` is A; ``rows`` is the shape of the row space, the result is ``[*rows, n]``, or
    ``[*rows, wide]`` with zeros after the n columns (:func:`widened`). With ``groups`` of columns, each whole tiles wide, each has an A of
    its own: ``read(row index, group, *k)``.

    A deep sum may be computed in slices (``SLICE``), so that a slice of A and of the packed weight stays in the cache while the tiles of
    a task pass over it; the slices' results add up in a second block.
    """
    m, blocks, columns = math.prod(rows), int(packed.shape[0]), int(packed.shape[-1])
    full_m, full_n = whole(m, plan.rows), whole(max(wide, n), columns)
    outer, factor = slices_of(taps, SLICE) if plan.sliced else ([], 1)
    attrs = {"plan": [int(v) for v in astuple(plan)]}

    def element(i: Any, j: Any, outside: Sequence[Any], inside: Sequence[Any]) -> Any:
        row = te.min(i, m - 1) if full_m != m else i
        k = [*outside, *inside] if factor == 1 else [outside[0] * (taps[0] // factor) + inside[0]]
        panel = te.min(j // columns, blocks - 1) if full_n > blocks * columns else j // columns
        group = [panel // (blocks // groups)] if groups else []
        return read(row, *group, *k) * packed[(panel, *k, j % columns)]

    if not outer:
        axes = [te.reduce_axis((0, size), name=f"k{d}") for d, size in enumerate(taps)]
        sums = te.compute(
            (full_m, full_n), lambda i, j: te.sum(element(i, j, (), axes), axis=axes), name=BLOCK, attrs=attrs
        )
    else:
        inner = [taps[0] // factor] if factor > 1 else list(taps[len(outer) :])
        axes = [te.reduce_axis((0, size), name=f"k{d}") for d, size in enumerate(inner)]
        parts = te.compute(
            (*outer, full_m, full_n),
            lambda *i: te.sum(element(i[-2], i[-1], i[:-2], axes), axis=axes),
            name=BLOCK,
            attrs=attrs,
        )
        over = [te.reduce_axis((0, size), name=f"s{d}") for d, size in enumerate(outer)]
        sums = te.compute((full_m, full_n), lambda i, j: te.sum(parts[(*over, i, j)], axis=over), name=ADDED)

    def crop(*index: Any) -> Any:
        row = index[0]
        for size, i in zip(rows[1:], index[1:-1]):
            row = row * size + i
        value, column = sums[row, index[-1]], index[-1]
        return te.if_then_else(column < blocks * columns, value, 0.0) if full_n > blocks * columns else value

    return te.compute((*rows, max(wide, n)), crop, name="crop")


def widened(plan: Plan, n: int, wide: int, machine: CpuInfo) -> Plan | None:
    """Return the plan of a product with ``n`` columns whose result is to have zeros after them, up to ``wide``; None where ``plan``
    cannot be widened, because a task does not take whole rows.
    """
    columns = plan.tile(machine).columns
    if plan.sliced or plan.column_tiles * columns < n:
        return None
    return replace(plan, column_tiles=-(-wide // columns))


def slices_of(taps: Sequence[int], least: int = 2 * SLICE) -> tuple[list[int], int]:
    """Return the outer loops that cut a sum over ``taps`` into slices, and, for a single loop, into how many it is split; ([], 1): it is
    not cut, because it is no deeper than ``least`` or not divisible.
    """
    if math.prod(taps) <= least:
        return [], 1
    if len(taps) == 1:
        factor = next((f for f in range(-(-taps[0] // SLICE), 4 * taps[0] // SLICE + 1) if taps[0] % f == 0), 1)
        return ([factor], factor) if factor > 1 else ([], 1)
    count = next((c for c in range(1, len(taps)) if math.prod(taps[c:]) <= SLICE), len(taps) - 1)
    return list(taps[:count]), 1


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Tile, keep the sums in registers, compute the epilogue on the tile, and spread the tiles over the threads."""
    gemm = sch.get_sblock(BLOCK)
    added = sch.get_sblock(ADDED) if any(sch.get(c).name_hint == ADDED for c in sch.get_consumers(gemm)) else None
    epilogue = inline_epilogue(sch, gemm if added is None else added, keep=frozenset((BLOCK, ADDED)))
    flatten_rows(sch, epilogue)
    n = _extent(sch, sch.get_loops(epilogue)[-1])
    rows, vectors, row_tiles, column_tiles, sliced = (int(v) for v in sch.get(gemm).annotations["plan"])
    plan = Plan(rows, vectors, row_tiles, column_tiles, bool(sliced))
    tile = plan.tile(machine)
    if added is None:
        _schedule_whole(sch, gemm, epilogue, tile, plan)
        return
    last = _schedule_slices(sch, gemm, added, epilogue, tile, plan)
    if part := register_part(n, tile.lanes):  # else LLVM vectorises the loop with its condition
        _, last = sch.split(last, [None, part])
        sch.vectorize(last)


def _schedule_whole(sch: s_tir.Schedule, gemm: Any, epilogue: Any, tile: Tile, plan: Plan) -> None:
    """Complete the sum of a tile in one go; the epilogue takes it from the registers."""
    n = _extent(sch, sch.get_loops(epilogue)[-1])
    i, j, *k = sch.get_loops(gemm)
    outer, middle, rows = sch.split(i, [None, plan.row_tiles, tile.rows])
    blocks, column, vectors, lanes = sch.split(j, [None, plan.column_tiles, tile.vectors, tile.lanes])
    sch.reorder(outer, blocks, middle, column, *k, rows, vectors, lanes)
    all_columns = _extent(sch, blocks) == 1  # then the end of a row is known where the last tile is code of its own
    count, end = _extent(sch, column), n // tile.columns
    summed = int(sch.get(gemm).reads[1].source.shape[0])  # column tiles; those after them are of a wider result
    ends = sorted({step for step in (summed, end) if all_columns and 0 < step < count})
    if ends:
        cut(sch, column, *ends)
    sch.parallel(sch.fuse(outer, blocks))
    single = all(_extent(sch, loop) == 1 for loop in sch.get_loops(epilogue))  # one number: its loops would be left out
    sch.reverse_compute_at(epilogue, column, preserve_unit_loops=single)
    sums = _registers(sch, gemm, k, (rows, vectors, lanes))
    if summed < count:
        idle(sch, column, summed, sums)
    *_, row, last = sch.get_loops(epilogue)
    part = register_part(n, tile.lanes)
    vector, lane = sch.split(last, [None, part or tile.lanes])
    if part or all_columns:
        sch.unroll(row)
        sch.unroll(vector)
    else:  # only the last register of a row asks which of its columns there are (LoopPartition needs an end that is no constant)
        sch.annotate(vector, "pragma_loop_partition_hint", 1)
    sch.vectorize(lane)


def _schedule_slices(sch: s_tir.Schedule, gemm: Any, added: Any, epilogue: Any, tile: Tile, plan: Plan) -> Any:
    """Go slice by slice over all tiles of a task, whose sums stay in the cache; return the epilogue's column loop."""
    i, j, *slices = sch.get_loops(added)
    outer, middle, rows = sch.split(i, [None, plan.row_tiles, tile.rows])
    blocks, column, vectors, lanes = sch.split(j, [None, plan.column_tiles, tile.vectors, tile.lanes])
    sch.reorder(outer, blocks, *slices, column, middle, rows, vectors, lanes)
    task = sch.fuse(outer, blocks)
    sch.parallel(task)
    sch.reverse_compute_at(epilogue, task)
    sch.compute_at(gemm, middle, preserve_unit_loops=True)
    count = sum(int(v.iter_type) == 2 for v in sch.get(gemm).iter_vars)
    *_, gi, gj = sch.get_loops(gemm)[:-count]
    k = sch.get_loops(gemm)[-count:]
    vector, lane = sch.split(gj, [None, tile.lanes])
    sch.reorder(*k, gi, vector, lane)
    _registers(sch, gemm, k, (gi, vector, lane))
    for loop in (rows, vectors):
        sch.unroll(loop)
    sch.vectorize(lanes)
    start = sch.decompose_reduction(added, slices[0])
    sch.vectorize(sch.get_loops(start)[-1])
    return sch.get_loops(epilogue)[-1]


def _registers(sch: s_tir.Schedule, gemm: Any, k: list, tile: tuple[Any, Any, Any]) -> Any:
    """Unroll the tile and a few steps of the innermost sum; start the sums from zero in registers. Return the outermost loop that sums."""
    rows, vectors, lanes = tile
    depth = _extent(sch, k[-1])
    unroll = next(u for u in (4, 3, 2, 1) if depth % u == 0) if depth > 4 else depth
    deep, step = sch.split(k[-1], [None, unroll])
    sch.vectorize(lanes)
    for loop in (rows, vectors, step):
        sch.unroll(loop)
    outermost = (*k[:-1], deep)[0]
    start = sch.decompose_reduction(gemm, outermost)
    *_, row, vector, lane = sch.get_loops(start)
    sch.vectorize(lane)
    sch.unroll(row)
    sch.unroll(vector)
    return outermost


def register_product(sch: s_tir.Schedule, block: Any, lanes: int) -> None:
    """Compute the innermost loops (row, column, k) of a product as a tile of sums in registers, a few steps of k unrolled; for products
    that are computed where their tile is used.
    """
    *_, row, column, k = sch.get_loops(block)
    vector, lane = sch.split(column, [None, lanes])
    size = _extent(sch, k)
    k, step = sch.split(k, [None, next(u for u in (4, 2, 1) if size % u == 0)])
    sch.reorder(k, step, row, vector, lane)
    sch.vectorize(lane)
    for loop in (row, vector, step):
        sch.unroll(loop)
    *_, row, vector, lane = sch.get_loops(sch.decompose_reduction(block, k))
    sch.vectorize(lane)
    sch.unroll(row)
    sch.unroll(vector)


def _extent(sch: s_tir.Schedule, loop: Any) -> int:
    return int(sch.get(loop).extent)


def _whole_tasks(row_tiles: int, column_tiles: int, tile: Tile, depth: int, machine: CpuInfo) -> list[tuple[int, int]]:
    """Return (row, column) tiles of a task, by estimated time: its part of A fits half the cache, and the tasks divide evenly over the
    threads.

    First tasks that go over all column tiles for every row tile, where the weight fits the cache: they write whole rows, read A once, and
    know where a row ends. Then tasks of one column tile.
    """
    fit = max(1, machine.cache // 2 // max(1, tile.rows * depth * 4))

    def cost(chunk: int) -> float:
        tasks = -(-row_tiles // chunk) * column_tiles
        share = -(-tasks // machine.threads) * chunk  # row tiles the busiest thread computes, the padded ones counted
        cost = share + (0.05 * share * (chunk / fit - 1) if chunk > fit else 0) + 0.3 * (-(-row_tiles // chunk))
        return round(cost * 1.02 if row_tiles % chunk else cost, 6)  # the last task carries a condition

    one = [(chunk, 1) for chunk in sorted(shares(row_tiles), key=cost)]
    even = [c for c in shares(row_tiles) if -(-row_tiles // c) % machine.threads == 0] or [1]
    wide = [
        (min(even, key=lambda c: abs(c - size)), column_tiles)
        for size in (32, 8)
        if column_tiles > 1 and depth * column_tiles * tile.columns * 4 <= machine.cache // 4
    ]
    alone = (
        [(row_tiles, column_tiles)]
        if row_tiles * column_tiles * tile.rows * tile.columns * depth <= MAX_SERIAL_PRODUCTS
        else []
    )
    return list(dict.fromkeys([*alone, *wide, *one]))


def whole(size: int, part: int) -> int:
    """Return ``size`` rounded up to a multiple of ``part``."""
    return -(-size // part) * part


def shares(count: int) -> list[int]:
    """Return the sizes of a part when ``count`` things are cut into 1, 2, 3, ... parts; few of the small ones."""
    parts = [*range(1, 33), *(1 << p for p in range(6, 16))]
    return sorted({-(-count // p) for p in parts if p <= count})


def _slice_tasks(row_tiles: int, column_tiles: int, tile: Tile, depth: int, machine: CpuInfo) -> list[tuple[int, int]]:
    """Return (row, column) tiles of a task, by estimated time: its slice of A and its sums share the cache, and the tasks divide evenly
    over the threads.
    """

    def cost(task: tuple[int, int]) -> float:
        rows, columns = task
        bytes_used = 4 * rows * tile.rows * (depth + columns * tile.columns)
        tasks = -(-row_tiles // rows) * -(-column_tiles // columns)
        share = -(-tasks // machine.threads) * rows * columns
        spill = max(0.0, bytes_used / (machine.cache // 2) - 1)
        # each task reads its rows of A once per slice and its columns of the weight once
        traffic = share * (1 / columns + 1 / rows) * 0.3
        return round(share * (1 + 0.1 * min(spill, 5)) + traffic, 6)

    return sorted(((r, c) for r in shares(row_tiles) for c in shares(column_tiles)), key=cost)
