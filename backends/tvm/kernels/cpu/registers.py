"""The innermost loop of a kernel, in registers: whole ones, and the rest where a row of results ends within one.

LLVM would vectorise a loop without our help, too; but a short one it unrolls first, and then gathers its operands from several rows.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir

from thresher.backends.tvm.kernels.loop_marks import cut

MIN_PART = 4  # elements: a narrower part of a register is not worth an instruction


def register_part(n: int, lanes: int) -> int:
    """Return the part of a register, the whole one if it can be, of which rows of ``n`` hold a whole number; 0 where it is too narrow."""
    part = math.gcd(n, lanes)
    return part if part >= MIN_PART else 0


def vectorise(sch: s_tir.Schedule, loop: Any, lanes: int, count: int = 0) -> tuple[Any, Any]:
    """Run a loop of known length over neighbouring elements in registers; what does not fill one is code of its own. ``count``: the
    elements there are, where the loop goes over padded ones. Return the loops over the registers and within one.
    """
    size = int(sch.get(loop).extent)
    count = count or size
    part = register_part(count, lanes)
    step, lane = sch.split(loop, [None, part or min(lanes, size)])
    if not part and count > lanes:
        cut(sch, step, count // lanes)
    sch.vectorize(lane)
    return step, lane
