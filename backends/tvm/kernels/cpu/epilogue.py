"""What follows the sums of a kernel (bias, activation, threshold, residual add): made one block, which is computed on a tile of them."""

from __future__ import annotations

from typing import Any

from tvm import s_tir
from tvm.tirx import IndexMap


def inline_epilogue(sch: s_tir.Schedule, anchor: Any, keep: frozenset[str] = frozenset()) -> Any:
    """Inline all that follows ``anchor`` into the last block, which is returned; blocks named in ``keep`` stay."""
    block = anchor
    while consumers := sch.get_consumers(block):
        block = consumers[0]
    last = sch.get(block).name_hint
    for other in sch.get_child_blocks(sch.get_sblock("root")):
        name = sch.get(other).name_hint
        if name not in (last, sch.get(anchor).name_hint) and name not in keep:
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
