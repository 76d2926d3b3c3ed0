"""How a kernel is recognised after fusion."""

from __future__ import annotations

from tvm import s_tir, tirx


def block_names(function: tirx.PrimFunc) -> set[str]:
    """The names of the outer blocks of a kernel. Empty for opaque functions."""
    try:
        schedule = s_tir.Schedule(function)
        return {str(schedule.get(b).name_hint) for b in schedule.get_child_blocks(schedule.get_sblock("root"))}
    except s_tir.ScheduleError:
        return set()
