"""A batch of products:  C[b, m, n] = sum_k A[b, m, k] B[b, k, n], where B is computed, or constant (Winograd's filters).

As for one constant right side (``gemm``), B is read as ``[N/NR][K][NR]``. A computed B is packed so at run time, before the product; it
costs one pass over B for M passes of arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from tvm import s_tir, te, tirx
from tvm.tirx import IndexMap

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu.epilogue import inline_epilogue
from thresher.backends.tvm.kernels.cpu.gemm import Tile, register_product, shares, tiles
from thresher.backends.tvm.kernels.cpu.registers import register_part
from thresher.backends.tvm.kernels.loop_marks import cut

PREFIX = "batched_"
PACKED, SUMS = f"{PREFIX}packed", f"{PREFIX}sums"
MIN_ROWS = 4  # rows: with fewer, packing costs as much as the product


@dataclass(frozen=True)
class Plan:
    """A tile of ``rows`` x ``vectors`` registers of sums; ``run``: row tiles that one task takes, for which it reads a panel of B once."""

    rows: int
    vectors: int
    run: int


def plans(m: int, n: int, k: int, batch: int, machine: CpuInfo, limit: int = 1) -> list[Plan]:
    """Return the ``limit`` most promising plans for ``batch`` products ``[m, k] x [k, n]``; the first is the estimate's choice."""
    candidates = []
    for t, tile in enumerate(tiles(m, n, k, machine)[: 1 if limit == 1 else 4]):
        rule = _run(-(-m // tile.rows), batch, tile, k, machine)
        runs = (
            [rule] if limit == 1 else list(dict.fromkeys((rule, max(1, rule // 2), min(2 * rule, -(-m // tile.rows)))))
        )
        candidates += [(t + i, t, Plan(tile.rows, tile.vectors, run)) for i, run in enumerate(runs)]
    return [plan for *_, plan in sorted(candidates, key=lambda f: f[:2])[:limit]]


def pack(right: Callable[..., Any], lead: Sequence[int], n: int, k: int, columns: int) -> te.Tensor:
    """Return ``right(*batch, k, n)`` as [*lead, N/NR, K, NR], computed at run time."""
    blocks = -(-n // columns)

    def element(*i: Any) -> Any:
        column = i[-3] * columns + i[-1]
        return right(*i[:-3], i[-2], te.min(column, n - 1) if blocks * columns != n else column)

    return te.compute((*lead, blocks, k, columns), element, name=PACKED)


def product(left: Callable[..., Any], packed: te.Tensor, m: int, n: int, plan: Plan) -> te.Tensor:
    """Return ``left(*batch, m, k)`` times ``packed`` [*batch, N/NR, K, NR] -> ``[*batch, m, n]``."""
    *lead, blocks, k, columns = (int(d) for d in packed.shape)
    full_m = -(-m // plan.rows) * plan.rows
    over = te.reduce_axis((0, k), name="k")
    sums = te.compute(
        (*lead, full_m, blocks * columns),
        lambda *i: te.sum(
            left(*i[:-2], te.min(i[-2], m - 1) if full_m != m else i[-2], over)
            * packed[(*i[:-2], i[-1] // columns, over, i[-1] % columns)],
            axis=over,
        ),
        name=SUMS,
        attrs={"plan": list(astuple(plan))},
    )
    return te.compute((*lead, m, n), lambda *i: sums[i], name=f"{PREFIX}out")


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Spread runs of row tiles of all products over the threads; a tile's sums stay in registers, and what follows is computed on it."""
    sums = sch.get_sblock(SUMS)
    names = {sch.get(b).name_hint for b in sch.get_child_blocks(sch.get_sblock("root"))}
    epilogue = inline_epilogue(sch, sums, keep=frozenset((PACKED,)))
    *batch, _, _ = (int(d) for d in sch.get(sums).writes[0].source.shape)
    nr = int(sch.get(sums).reads[1].source.shape[-1])
    if PACKED in names:
        blocks = sch.get_loops(sch.get_sblock(PACKED))[: len(batch) + 1]
        sch.parallel(sch.fuse(*blocks) if len(blocks) > 1 else blocks[0])
    _by_rows(sch, epilogue)
    b, i, j = sch.get_loops(epilogue)
    n = int(sch.get(j).extent)
    plan = Plan(*(int(v) for v in sch.get(sums).annotations["plan"]))
    i, middle, row = sch.split(i, [None, plan.run, plan.rows])
    j, column = sch.split(j, [None, nr])
    sch.reorder(b, i, j, middle, row, column)
    sch.parallel(sch.fuse(b, i))
    sch.compute_at(sums, middle, preserve_unit_loops=True)
    register_product(sch, sums, machine.lanes)
    part = register_part(n, machine.lanes)
    if not part and n > nr:
        cut(sch, j, (n - 1) // nr)
    vector, lane = sch.split(column, [None, part or machine.lanes])
    sch.vectorize(lane)
    for loop in (row, vector):
        sch.unroll(loop)


def _run(row_tiles: int, batch: int, tile: Tile, depth: int, machine: CpuInfo) -> int:
    """Return as many row tiles as fit the cache and leave work for all threads."""
    fit = max(1, machine.cache // 2 // (tile.rows * depth * 4))
    wanted = -(-4 * machine.threads // batch)  # tasks per product
    return max(c for c in shares(row_tiles) if c == 1 or (c <= fit and -(-row_tiles // c) >= min(wanted, row_tiles)))


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
