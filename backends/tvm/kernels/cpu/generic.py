"""Everything without a kernel of its own: elementwise chains, movement, pools, reductions.

Chains are inlined into what uses them; the outer loops go over the threads; the innermost loop runs along the dimension that lies
next to itself in memory, where LLVM vectorises it. A reduction over outer dimensions keeps its sums in a row of registers. A long sum is
one of partial sums: a chain of additions rounds in proportion to its length, and cannot be vectorised.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, sym, tirx
from tvm.s_tir.schedule import ScheduleError

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu.registers import register_part, vectorise

APART = "apart"  # the block of an elementwise function that is fused with nothing
BIAS_MAP = "bias_map"  # the block that adds a compacted constant image
TRANSPOSED_ELEMENTS = 32  # neighbouring results that are computed together where what they need lies in lines across
MAX_REGISTERS = 8  # registers of sums
CHAIN = 64  # numbers that are added one after the other
MOST_CHAIN = 512  # up to which a sum in lanes is not cut into parts
LANES = (64, 48, 32, 16, 8)  # partial sums of neighbouring elements
MIN_PARALLEL_ELEMENTS = 4096  # fewer elements than this are not worth waking the other threads


def schedule(sch: s_tir.Schedule, machine: CpuInfo) -> None:
    """Inline elementwise chains, then spread the outer loops over the threads."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if _is_spatial(sch, block) and sch.get_consumers(block):
            try:
                sch.compute_inline(block)
            except ScheduleError:
                continue  # read in a way that cannot be inlined: it stays a loop of its own
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    for block in blocks:
        if not sch.get_loops(block):  # beside one TVM cannot take partial sums apart
            sch.add_unit_loop(block)
    for block in blocks:
        _schedule_block(sch, block, machine)


def _is_spatial(sch: s_tir.Schedule, block: Any) -> bool:
    return all(int(v.iter_type) == 0 for v in sch.get(block).iter_vars)


def _schedule_block(sch: s_tir.Schedule, block: Any, machine: CpuInfo) -> None:
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    loops = sch.get_loops(block)
    if not loops or len(loops) != len(kinds) or any(kind not in (0, 2) for kind in kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == 0]
    reduction = [loop for loop, kind in zip(loops, kinds) if kind == 2]
    total = 1
    for loop in loops:
        extent = sch.get(loop).extent
        total *= int(extent) if hasattr(extent, "value") else MIN_PARALLEL_ELEMENTS
    if reduction:
        _schedule_reduction(sch, block, spatial, reduction, total, machine)
    elif total >= MIN_PARALLEL_ELEMENTS and len(spatial) > 1:
        _schedule_elements(sch, block, spatial, machine)
    elif total >= MIN_PARALLEL_ELEMENTS:
        _parallel_flat(sch, spatial[0], machine)


def _schedule_elements(sch: s_tir.Schedule, block: Any, loops: list, machine: CpuInfo) -> None:
    """Spread the outer loops over the threads, the innermost in registers. What is read across it is read a cache line at a time."""
    size = sch.get(loops[-1]).extent
    known = hasattr(size, "value")
    across = _read_across(sch, block)
    if across is not None and known:
        step, inner = sch.split(loops[-1], [None, min(int(size), TRANSPOSED_ELEMENTS)])
        outer = [loop for i, loop in enumerate(loops[:-1]) if i != across]
        sch.reorder(*outer, step, loops[across], inner)
        sch.parallel(sch.fuse(*outer, step))
        return
    short = known and int(size) < machine.lanes and len(loops) > 2
    outer = loops[: -2 if short else -1]  # one index to take apart for a few elements would cost more than they do
    sch.parallel(_fused(sch, outer))
    if known and _reads_along(sch, block):
        vectorise(sch, loops[-1], machine.lanes)


def _reads_along(sch: s_tir.Schedule, block: Any) -> bool:
    """Return whether everything that is read either lies along the last spatial loop, in its order, or is the same for all of it."""
    *_, last = [v.var for v in sch.get(block).iter_vars if int(v.iter_type) == 0]
    analyzer = sym.Analyzer()

    def along(region: Any) -> bool:
        *others, inner = [r.min for r in region]
        step = inner if _without(inner, last) else analyzer.simplify(inner - last)
        return all(_without(index, last) for index in (*others, step))

    return all(along(read.region) for read in sch.get(block).reads if read.region)


def _read_across(sch: s_tir.Schedule, block: Any) -> int | None:
    """Return the number of the loop along which lies what is read, where that is not the last one; None: nothing is, or in parts."""
    *others, last = [v.var for v in sch.get(block).iter_vars]
    for read in sch.get(block).reads:
        if read.region and not _without(read.region[-1].min, *others) and _without(read.region[-1].min, last):
            loops = [i for i, var in enumerate(others) if read.region[-1].min.same_as(var)]
            if loops and not all(_without(r.min, last) for r in read.region):
                return loops[0]
    return None


def _without(expression: Any, *variables: tirx.Var) -> bool:
    """Return whether none of the variables is in the expression."""
    return not set(variables) & set(tirx.analysis.undefined_vars(tirx.Evaluate(expression), []))


def _parallel_flat(sch: s_tir.Schedule, loop: Any, machine: CpuInfo) -> None:
    extent = sch.get(loop).extent
    if hasattr(extent, "value") and int(extent) % machine.threads == 0:
        outer, _ = sch.split(loop, [machine.threads, None])
        sch.parallel(outer)
    else:
        outer, _ = sch.split(loop, [None, 1024])
        sch.parallel(outer)


def _schedule_reduction(
    sch: s_tir.Schedule, block: Any, spatial: list, reduction: list, total: int, machine: CpuInfo
) -> None:
    if partial := _partial_sums(sch, block, spatial, reduction):
        for summed, results in ((partial, len(spatial) + 1), (block, len(spatial))):
            loops = sch.get_loops(summed)
            elements = math.prod(int(sch.get(loop).extent) for loop in loops)
            _schedule_reduction(sch, summed, loops[:results], loops[results:], elements, machine)
        return
    if not spatial:
        sch.decompose_reduction(block, reduction[0])
        return
    if len(spatial) > 1 and not _reduces_rows(sch, block):
        one_result = len(sch.get(block).writes) == 1  # of an index beside a value only one would be kept in registers
        if one_result and _reads_along(sch, block) and (width := _row_in_registers(sch, spatial[-1], machine)):
            _schedule_row(sch, block, width, total, machine)
            return
        *outer, inner = spatial
        sch.reorder(*outer, *reduction, inner)
        if total >= MIN_PARALLEL_ELEMENTS:
            sch.parallel(_fused(sch, outer))
        sch.decompose_reduction(block, reduction[0])
        return
    outer = _fused(sch, spatial)
    if total >= MIN_PARALLEL_ELEMENTS:
        sch.parallel(outer)
    sch.decompose_reduction(block, reduction[0])


def _partial_sums(sch: s_tir.Schedule, block: Any, spatial: list, reduction: list) -> Any:
    """Give the partial sums of a long sum a block of their own and return it; None where the sum is short, or not one of the elements of a
    tensor, or where the number of its elements has no factor that fits: TVM loses the condition on a part that is not whole.
    """
    known = all(hasattr(sch.get(loop).extent, "value") for loop in (*spatial, *reduction))
    sizes = [int(sch.get(loop).extent) for loop in reduction] if known else [0]
    if math.prod(sizes) < 2 * CHAIN or not _adds_elements_once(sch, block):
        return None
    *outer, last = sizes
    lanes = next((n for n in LANES if last % n == 0 and last >= 2 * n), 1) if _reduces_rows(sch, block) else 1
    axis, position = 0, len(spatial)  # of the partial sums, in what they are kept in, and among the loops
    if math.prod(outer) > 1:
        part = _fused(sch, reduction[:-1])
    elif lanes > 1 and last // lanes <= MOST_CHAIN:
        *_, part = sch.split(_fused(sch, reduction), [None, lanes])
        axis, position = len(spatial), -1
    elif size := next((n * lanes for n in range(CHAIN, CHAIN // 4, -1) if last % (n * lanes) == 0), 0):
        part, *_ = sch.split(_fused(sch, reduction), [None, size])
    else:
        return None
    partial = sch.rfactor(part, axis)
    loops = sch.get_loops(partial)
    loops.insert(axis, loops.pop(position))
    sch.reorder(*loops)
    return partial


def _fused(sch: s_tir.Schedule, loops: list) -> Any:
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def _adds_elements_once(sch: s_tir.Schedule, block: Any) -> bool:
    """Return whether a block adds up what it reads, each element about once; a product reads its factors many times."""
    body, start = sch.get(block).body, sch.get(block).init
    if not isinstance(body, tirx.BufferStore) or not isinstance(body.value, tirx.Add) or start is None:
        return False
    count = math.prod(int(v.dom.extent) for v in sch.get(block).iter_vars)
    read = sum(math.prod(map(int, r.source.shape)) for r in sch.get(block).reads)
    return count <= 2 * read


def _schedule_row(sch: s_tir.Schedule, block: Any, width: int, total: int, machine: CpuInfo) -> None:
    """Sum ``width`` neighbouring results in registers."""
    result = sch.cache_write(block, 0, "global")
    *outer, column = sch.get_loops(result)
    part, row = sch.split(column, [None, width])
    task = sch.fuse(*outer, part)
    if total >= MIN_PARALLEL_ELEMENTS:
        sch.parallel(task)
    sch.compute_at(block, task, preserve_unit_loops=True)
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    inner = list(zip(sch.get_loops(block)[-len(kinds) :], kinds))
    *single, column = [loop for loop, kind in inner if kind == 0]
    steps = [loop for loop, kind in inner if kind == 2]
    register, lane = vectorise(sch, column, machine.lanes)
    sch.reorder(*single, *steps, register, lane)
    sch.unroll(register)
    sch.decompose_reduction(block, steps[0])
    sch.unroll(vectorise(sch, row, machine.lanes)[0])


def _row_in_registers(sch: s_tir.Schedule, loop: Any, machine: CpuInfo) -> int:
    """Return how many neighbouring results keep their sums in registers: a whole number of registers, or parts of them, that divides the
    row, or a row that is short; 0: the row has no such part.
    """
    size = sch.get(loop).extent
    if not hasattr(size, "value"):
        return 0
    part, size, most = register_part(int(size), machine.lanes), int(size), MAX_REGISTERS * machine.lanes
    if not part:
        return size if size <= most else 0
    return next(part * r for r in range(most // part, 0, -1) if size % (part * r) == 0)


def _reduces_rows(sch: s_tir.Schedule, block: Any) -> bool:
    """Return whether a reduced index runs along the contiguous dimension of what is read."""
    reduced = {v.var for v in sch.get(block).iter_vars if int(v.iter_type) == 2}
    return any(read.region and read.region[-1].min in reduced for read in sch.get(block).reads)
