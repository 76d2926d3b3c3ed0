"""Everything without a kernel of its own: elementwise chains, movement, pools, reductions.

Chains are inlined into what uses them; the outer loops go over the threads; the innermost loop runs along the dimension that lies
next to itself in memory, where LLVM vectorises it. A reduction over outer dimensions keeps its sums in a row of registers.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir
from tvm.s_tir.schedule import ScheduleError

from thresher.backends.tvm.kernels.machine import Machine

BIAS_MAP = "bias_map"  # the block that adds a compacted constant image
SMALL = 4096  # fewer elements than this are not worth waking the other threads


def schedule(sch: s_tir.Schedule, machine: Machine) -> None:
    """Inline, then spread over the threads."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if _is_spatial(sch, block) and sch.get_consumers(block):
            try:
                sch.compute_inline(block)
            except ScheduleError:
                continue  # read in a way that cannot be inlined: it stays a loop of its own
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_block(sch, block, machine)


def _is_spatial(sch: s_tir.Schedule, block: Any) -> bool:
    return all(int(v.iter_type) == 0 for v in sch.get(block).iter_vars)


def _schedule_block(sch: s_tir.Schedule, block: Any, machine: Machine) -> None:
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    loops = sch.get_loops(block)
    if not loops or len(loops) != len(kinds) or any(kind not in (0, 2) for kind in kinds):
        return
    spatial = [loop for loop, kind in zip(loops, kinds) if kind == 0]
    reduction = [loop for loop, kind in zip(loops, kinds) if kind == 2]
    total = 1
    for loop in loops:
        extent = sch.get(loop).extent
        total *= int(extent) if hasattr(extent, "value") else SMALL
    if reduction:
        _schedule_reduction(sch, block, spatial, reduction, total, machine)
    elif total >= SMALL and len(spatial) > 1:
        size = sch.get(spatial[-1]).extent
        short = hasattr(size, "value") and int(size) < machine.lanes and len(spatial) > 2
        outer = spatial[
            : -2 if short else -1
        ]  # one index to take apart for a few elements would cost more than they do
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])
    elif total >= SMALL:
        _parallel_flat(sch, spatial[0], machine)


def _parallel_flat(sch: s_tir.Schedule, loop: Any, machine: Machine) -> None:
    extent = sch.get(loop).extent
    if hasattr(extent, "value") and int(extent) % machine.threads == 0:
        outer, _ = sch.split(loop, [machine.threads, None])
        sch.parallel(outer)
    else:
        outer, _ = sch.split(loop, [None, 1024])
        sch.parallel(outer)


def _schedule_reduction(
    sch: s_tir.Schedule, block: Any, spatial: list, reduction: list, total: int, machine: Machine
) -> None:
    if not spatial:
        sch.decompose_reduction(block, reduction[0])
        return
    if len(spatial) > 1 and not _reduces_rows(sch, block):
        if width := _row_in_registers(sch, spatial[-1], machine):
            _schedule_row(sch, block, len(reduction), width, total, machine)
            return
        *outer, inner = spatial
        sch.reorder(*outer, *reduction, inner)
        if total >= SMALL:
            sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])
        sch.decompose_reduction(block, reduction[0])
        return
    outer = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    if total >= SMALL:
        sch.parallel(outer)
    sch.decompose_reduction(block, reduction[0])


def _schedule_row(sch: s_tir.Schedule, block: Any, reduced: int, width: int, total: int, machine: Machine) -> None:
    """``width`` neighbouring results are summed in registers, over the ``reduced`` innermost loops of the block."""
    result = sch.cache_write(block, 0, "local")
    *outer, column = sch.get_loops(result)
    part, row = sch.split(column, [None, width])
    task = sch.fuse(*outer, part)
    if total >= SMALL:
        sch.parallel(task)
    sch.compute_at(block, task)
    *_, column = sch.get_loops(block)[:-reduced]
    steps = sch.get_loops(block)[-reduced:]
    register, lane = sch.split(column, [None, machine.lanes])
    sch.reorder(*steps, register, lane)
    sch.vectorize(lane)
    sch.unroll(register)
    sch.decompose_reduction(block, steps[0])
    register, lane = sch.split(row, [None, machine.lanes])
    sch.unroll(register)
    sch.vectorize(lane)


def _row_in_registers(sch: s_tir.Schedule, loop: Any, machine: Machine) -> int:
    """How many neighbouring results keep their sums in registers: whole registers that divide the row; 0: the row has no such part."""
    size = sch.get(loop).extent
    if not hasattr(size, "value") or int(size) % machine.lanes:
        return 0
    return next(machine.lanes * r for r in (8, 7, 6, 5, 4, 3, 2, 1) if int(size) % (machine.lanes * r) == 0)


def _reduces_rows(sch: s_tir.Schedule, block: Any) -> bool:
    """Whether a reduced index runs along the contiguous dimension of what is read."""
    reduced = {v.var for v in sch.get(block).iter_vars if int(v.iter_type) == 2}
    return any(read.region and read.region[-1].min in reduced for read in sch.get(block).reads)
