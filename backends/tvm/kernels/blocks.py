"""How kernels are recognised, and what may be fused with them."""

from __future__ import annotations

from tvm import s_tir, tirx

#: Values of TVM's OpPatternKind, the attribute ``op_pattern`` of a kernel: what ``FuseOps`` may put before and after it.
ELEMENTWISE, INJECTIVE, OUT_ELEMENTWISE_FUSABLE, OPAQUE = 0, 2, 4, 8


def block_names(function: tirx.PrimFunc) -> set[str]:
    """Return the names of the outer blocks of a kernel, none for a function that has no schedulable blocks."""
    try:
        schedule = s_tir.Schedule(function)
        return {str(schedule.get(b).name_hint) for b in schedule.get_child_blocks(schedule.get_sblock("root"))}
    except s_tir.ScheduleError:
        return set()
