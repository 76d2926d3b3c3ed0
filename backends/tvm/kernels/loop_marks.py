"""Marks on the loops of a CPU schedule that code generation heeds (``codegen/tir_pipeline.py``)."""

from __future__ import annotations

from typing import Any

from tvm import s_tir

CUTS, IDLE, SUMS = "thresher.cuts", "thresher.idle", "thresher.sums"  # the names of the annotations


def cut(sch: s_tir.Schedule, loop: Any, *steps: int) -> None:
    """Make code of its own from each of these steps of a loop on."""
    sch.annotate(loop, CUTS, list(steps))


def idle(sch: s_tir.Schedule, loop: Any, step: int, sums: Any) -> None:
    """Leave the loop ``sums`` out from ``step`` of the outer loop on: nobody reads what it would add up."""
    sch.annotate(loop, IDLE, step)
    sch.annotate(sums, SUMS, 1)
