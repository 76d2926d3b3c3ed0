"""Schedules for CUDA: tensor cores where the operands are half precision, one thread per result for small windows, dlight's rules for the
rest.

The product's tile is chosen for the problem: the largest whose tiles still occupy the multiprocessors. The structure of the tensor-core
schedule (operands through shared memory with a pipelined copy, WMMA fragments of 16 x 16 x 16, sums in float32, epilogue fused into the
store) is that of dlight's ``MatmulTensorization``, which has one tile, for large problems only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import get_root_block, normalize_prim_func
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.s_tir.dlight.gpu.matmul import (
    auto_inline_consumer_chain,
    auto_inline_producers,
    get_in_out_dtypes,
    get_index_map,
    get_reduction_blocks,
)
from tvm.s_tir.schedule import ScheduleError
from tvm.target import Target

from thresher.backends.tvm.plans.plan_selection import PlanSelector

FRAGMENT, WARP, VECTOR = 16, 32, 4
HALVES = ("float16", "bfloat16")
WINDOW = 256  # results that sum at most so many elements are computed by one thread each
MULTIPROCESSORS = 108  # of the smallest GPU with these tensor cores that is worth filling (A100)


@dataclass(frozen=True)
class Tile:
    """``warps`` [rows, columns] of a block, each with ``fragments`` [rows, columns] of sums; ``depth`` of a slice in shared memory."""

    warps: tuple[int, int]
    fragments: tuple[int, int]
    depth: int = 64

    @property
    def rows(self) -> int:
        """The rows of a block of threads."""
        return self.warps[0] * self.fragments[0] * FRAGMENT

    @property
    def columns(self) -> int:
        """The columns of a block of threads."""
        return self.warps[1] * self.fragments[1] * FRAGMENT


SHAPES = ((4, 4), (2, 2)), ((2, 4), (2, 2)), ((2, 2), (2, 2)), ((2, 2), (1, 2)), ((1, 4), (1, 1))
TILES = [Tile(*shape, depth) for depth in (64, 32) for shape in SHAPES]


def tiles(batch: int, m: int, n: int, k: int) -> list[Tile]:
    """Return all tiles, by estimated time: waves of blocks over the multiprocessors, times the work of a block, which a small tile does
    less efficiently because it reads more for each product, and a shallow slice because it waits more often.
    """

    def cost(tile: Tile) -> float:
        blocks = batch * -(-m // tile.rows) * -(-n // tile.columns)
        together = max(1, 512 // (WARP * math.prod(tile.warps)))  # small blocks share a multiprocessor
        waves = -(-blocks // (MULTIPROCESSORS * together))
        work = waves * together * (tile.rows * tile.columns + 32 * (tile.rows + tile.columns))
        return work * -(-k // tile.depth) * (tile.depth + 8)

    return sorted(TILES, key=cost)


class Rule(GPUScheduleRule):
    """A rule of ours, which is asked for kernels of GPUs only; ``selector`` chooses the plans."""

    def __init__(self, selector: PlanSelector):
        super().__init__()
        self.selector = selector

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        return self.scheduled(func, target)

    def scheduled(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        """Return the kernel with its schedule; None where it is for another rule."""
        raise NotImplementedError


class TensorCores(Rule):
    """Schedules products and convolutions (as implicit products) of float16 and bfloat16, of any size."""

    def scheduled(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        sch = s_tir.Schedule(func)
        blocks = get_reduction_blocks(sch, sch.get_child_blocks(get_root_block(sch)))
        if blocks is None or get_index_map(sch.get(blocks[0])) is None:
            return None
        if get_in_out_dtypes(sch.get(blocks[0]))[0] not in HALVES:
            return None
        workload = workload_of(sch, blocks[0])
        try:
            return _product(
                sch, blocks[0], lambda *size: self.selector.choose(workload, func, lambda n: tiles(*size)[:n])
            )
        except ScheduleError:  # an access that does not fit fragments: the next rule takes it
            self.selector.sites.pop(workload, None)
            return None


def workload_of(sch: s_tir.Schedule, main: Any) -> str:
    """Describe the product by its name and the shapes of what it reads and writes; what follows it does not matter."""
    block = sch.get(main)
    values = [region.source for region in (*block.reads, *block.writes)]
    shapes = [f"{'x'.join(str(d) for d in v.shape)}:{v.dtype}" for v in values]
    return " ".join(["tensor cores", str(block.name_hint), *shapes])


def _product(sch: s_tir.Schedule, main: Any, choose: Callable[..., Tile]) -> s_tir.Schedule:
    batch, i, j, k, tile = _as_product(sch, main, choose)
    (i, i_inner), (j, j_inner), (k, k_inner) = (sch.split(loop, [None, FRAGMENT]) for loop in (i, j, k))
    sch.reorder(i, j, k, i_inner, j_inner, k_inner)
    inner, outer = main, sch.blockize(i_inner)
    i, warp_i, fragment_i = sch.split(i, [None, tile.warps[0], tile.fragments[0]])
    j, warp_j, fragment_j = sch.split(j, [None, tile.warps[1], tile.fragments[1]])
    k, step = sch.split(k, [None, tile.depth // FRAGMENT])
    sch.annotate(k, "software_pipeline_order", [0, 3, 1, 4, 5, 2, 6])
    sch.annotate(k, "software_pipeline_stage", [0, 0, 0, 0, 0, 1, 1])
    sch.annotate(step, "software_pipeline_order", [0, 1, 2])
    sch.annotate(step, "software_pipeline_stage", [0, 0, 1])
    sch.reorder(i, j, warp_j, warp_i, k, step, fragment_i, fragment_j)
    warp = sch.fuse(warp_j, warp_i)
    for loop, axis in ((batch, "blockIdx.z"), (i, "blockIdx.x"), (j, "blockIdx.y"), (warp, "threadIdx.y")):
        sch.bind(loop, axis)
    warps = math.prod(tile.warps)
    for operand in (0, 1):
        auto_inline_producers(sch, _to_shared(sch, outer, operand, k, warps))
    a, b = (sch.cache_read(outer, operand, f"wmma.matrix_{name}") for operand, name in enumerate("ab"))
    sch.compute_at(a, step)
    sch.compute_at(b, step)
    result = sch.cache_write(outer, 0, "shared.dyn")
    sch.storage_align(result, 0, -2, 16, 4)
    store = sch.cache_write(outer, 0, "wmma.accumulator")
    sch.reverse_compute_at(store, warp)
    sch.reverse_compute_at(result, warp)
    _fragments(sch, store)
    start = sch.decompose_reduction(outer, k)
    _tensorize(sch, (a, b), sch.get_child_blocks(start)[0], inner, store)
    auto_inline_consumer_chain(sch, result)
    fused = sch.fuse(*sch.get_loops(result)[-2:])
    _, lane, vector = sch.split(fused, [None, WARP, VECTOR])
    sch.bind(lane, "threadIdx.x")
    sch.vectorize(vector)
    return sch


def _as_product(sch: s_tir.Schedule, main: Any, choose: Callable[..., Tile]) -> tuple[Any, Any, Any, Any, Tile]:
    """Bring the block into the form C[b, i, j] += A[b, i, k] B[b, j, k], padded to whole tiles; its loops and its tile."""
    reads = [sch.reindex(main, ("read", operand)) for operand in (0, 1)]
    write = sch.reindex(main, ("write", 0))
    product, *reading, writing = get_index_map(sch.get(main))
    for block, index in zip(reads, reading):
        sch.transform_layout(block, ("write", 0), index)
    sch.transform_layout(write, ("read", 0), writing)
    sch.transform_block_layout(main, product)
    sizes = [sch.get(loop).extent for loop in sch.get_loops(main)]
    known = [int(s) if hasattr(s, "value") else 1024 for s in sizes]
    tile = choose(*known)
    sch.pad_einsum(main, [1, tile.rows, tile.columns, tile.depth])
    return (*sch.get_loops(main), tile)


def _to_shared(sch: s_tir.Schedule, outer: Any, operand: int, k: Any, warps: int) -> Any:
    """Copy a slice of an operand to shared memory with all threads, the next one while this one is used."""
    block = sch.cache_read(outer, operand, "shared.dyn")
    sch.compute_at(block, k)
    fused = sch.fuse(*sch.get_loops(block)[-2:])
    _, warp, lane, vector = sch.split(fused, [None, warps, WARP, VECTOR])
    sch.bind(lane, "threadIdx.x")
    sch.bind(warp, "threadIdx.y")
    sch.vectorize(vector)
    sch.storage_align(block, 0, axis=-2, factor=16, offset=8)
    sch.annotate(block, "tirx.manifest_shared_memory_local_stage", 1)
    sch.annotate(block, "double_buffer_scope", 0)
    return block


def _fragments(sch: s_tir.Schedule, block: Any) -> Any:
    """Split the block's last two loops into fragments; returns the loop over a fragment's rows."""
    i, j = sch.get_loops(block)[-2:]
    (i, row), (j, column) = (sch.split(loop, [None, FRAGMENT]) for loop in (i, j))
    sch.reorder(i, j, row, column)
    sch.unroll(i)
    sch.unroll(j)
    return row


def _tensorize(sch: s_tir.Schedule, reads: tuple[Any, Any], start: Any, inner: Any, store: Any) -> None:
    block = sch.get(inner)
    group = _intrinsics(*(str(region.source.dtype) for region in (block.reads[-1], block.writes[0])))
    for block, name in zip(reads, ("load_a", "load_b")):
        sch.tensorize(_fragments(sch, block), group[name])
    sch.tensorize(sch.get_loops(start)[-2], group["init"])
    sch.tensorize(sch.get_loops(store)[-2], group["store"])
    sch.tensorize(sch.get_loops(inner)[-3], group["compute"])


@functools.cache
def _intrinsics(dtype: str, sums: str) -> dict[str, str]:
    """Return the names of the intrinsics on fragments: TVM's, and made alike for bfloat16, where it has none."""
    from tvm.s_tir.tensor_intrin import cuda as stock

    shared, size = "shared.dyn", (FRAGMENT, FRAGMENT, FRAGMENT)
    names: dict[str, str] = stock.get_wmma_intrin_group(shared, shared, "float16", sums, trans_b=True)
    if dtype == "float16":
        return names
    intrinsics = {
        "load_a": stock.get_wmma_load_intrin(*size, dtype, shared, False, False),
        "load_b": stock.get_wmma_load_intrin(*size, dtype, shared, True, True),
        "compute": stock.get_wmma_sync_intrin(*size, dtype, sums, True),
    }
    for name, (meaning, code) in intrinsics.items():
        names[name] = f"thresher_{name}_{dtype}_{sums}"
        s_tir.TensorIntrin.register(names[name], meaning, code)
    return names


class Searched(Rule):
    """Uses the schedules that a search (``Tune(search=...)``) found for kernels without tiles of ours."""

    def scheduled(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        return self.selector.schedule(func)


class SmallWindow(Rule):
    """Gives depthwise and grouped convolutions and pools one thread per result; dlight would give each a block of 256 threads."""

    def scheduled(self, func: tirx.PrimFunc, target: Target) -> s_tir.Schedule | None:
        reductions = [b for b in normalize_prim_func(s_tir.Schedule(func)) or [] if b.is_reduction()]
        if len(reductions) != 1:
            return None
        summed = [it.dom for it in reductions[0].iters if it.kind == "R"]
        if any(not isinstance(size, int) for size in summed) or math.prod(summed) > WINDOW:
            return None
        return dlight.gpu.Fallback().apply(func, target, False)


def rules(selector: PlanSelector) -> list[Any]:
    """Return the rules in the order in which they are asked."""
    gpu = dlight.gpu
    return [
        TensorCores(selector),
        Searched(selector),
        gpu.Matmul(),
        gpu.GEMV(),
        SmallWindow(selector),
        gpu.Reduction(),
        gpu.GeneralReduction(),
        gpu.Fallback(),
    ]
