"""Attention for GPUs in one pass over the keys, in half precision on tensor cores: the caller of ``flash_attention.cuh``.

TVM's schedules know no running softmax over fragments whose layout in the registers the hardware fixes, so the kernel is CUDA C++, one
template for all sizes. (FlashAttention: Dao et al., 2022; FlashAttention-2: Dao, 2023.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm import te, tirx

MIN_ARCH = 80  # compute capability, ten times, from which on the instructions exist
ROWS, THREADS = 64, 128
MIN_KEYS = 16  # keys of a tile
MAX_HEAD_WIDTH = 128  # of a head: its tiles must fit 48 KB of shared memory
HALVES = ("float16", "bfloat16")


def fits(
    arch: int,
    dtype: str,
    shapes: Sequence[Sequence[int]],
    block_q: int = ROWS,
    block_k: int = ROWS,
    skips: bool = False,
) -> bool:
    """Return whether there is a kernel for ``shapes`` of q, k and v, blocks of lists, and ``skips`` of blocks with small weights."""
    q, k, v = shapes
    if block_q % ROWS or block_k % MIN_KEYS:
        return False
    if skips and (block_q, block_k) != (ROWS, tile(q[3], v[3], block_k)):
        return False
    return arch >= MIN_ARCH and dtype in HALVES and max(q[3], v[3]) <= MAX_HEAD_WIDTH and 0 not in (*q, *k, *v)


def tile(e: int, f: int, block_k: int = 64) -> int:
    """Return the keys of a tile, for heads of e and f channels: as many as fit shared memory, a part of a block."""
    return math.gcd(64 if max(e, f) <= 64 else 32, block_k)


@dataclass(frozen=True)
class Operand:
    """A [B, H, L, E] value by the sizes and the elements between neighbours of each dimension; stride 0 where it is broadcast."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(shape: Sequence[int], heads_inside: bool = False) -> Operand:
        """Return a contiguous operand; ``heads_inside``: stored as [B, L, H, E]."""
        b, h, length, e = shape
        strides = (length * h * e, e, h * e, 1) if heads_inside else (h * length * e, length * e, e, 1)
        return Operand((b, h, length, e), strides)

    @staticmethod
    def mask(shape: Sequence[int]) -> Operand:
        """Return a contiguous mask of four dimensions; those of size 1 are broadcast."""
        strides: list[int] = []
        step = 1
        for size in reversed(shape):
            strides.insert(0, 0 if size == 1 else step)
            step *= size
        return Operand(tuple(shape), tuple(strides))


@dataclass(frozen=True)
class Problem:
    """One attention; ``mask_kind``: NONE, BOOLEAN or ADDED (float32), as in the kernel; ``lists``: the shape of the lists of key blocks."""

    q: Operand
    k: Operand
    v: Operand
    mask: Operand | None
    mask_kind: str
    causal: bool
    scale: float
    dtype: str
    softcap: float | None = None
    lists: tuple[int, ...] | None = None
    block_q: int = ROWS
    block_k: int = ROWS
    skip: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """The blocks of threads: (heads of all samples, tiles of queries)."""
        b, h, rows, _ = self.q.shape
        return b * h, -(-rows // ROWS)

    @property
    def function(self) -> str:
        """The instance of the template."""
        e, f = self.q.shape[3], self.v.shape[3]
        wide = all(s % 8 == 0 for o in (self.q, self.k, self.v) for s in (*o.strides[:3], o.shape[3]))
        flags = [
            self.dtype == "bfloat16",
            self.causal,
            f"thresher::{self.mask_kind}",
            e,
            f,
            tile(e, f, self.block_k if self.lists or self.skip is not None else 64),
            wide,
            self.softcap is not None,
            self.block_q if self.lists else 0,
            self.block_k if self.lists else 0,
            self.skip is not None,
        ]
        return (
            f"thresher::flash_attention<{', '.join(str(x).lower() if isinstance(x, bool) else str(x) for x in flags)}>"
        )

    @property
    def arguments(self) -> list[int | float]:
        """The numbers that follow the pointers."""
        (_, heads, rows, _), keys = self.q.shape, self.k.shape[2]
        strides = [s for o in (self.q, self.k, self.v) for s in o.strides[:3]]
        return [
            heads,
            heads // self.k.shape[1],
            rows,
            keys,
            self.scale,
            float(self.softcap or 0.0),
            float(self.skip or 0.0),
            *self._list_strides,
            *strides,
            *(self.mask.strides if self.mask else [0] * 4),
        ]

    @property
    def _list_strides(self) -> tuple[int, int, int]:
        """Lists from one sample and one head to the next, and the length of one."""
        if self.lists is None:
            return 0, 0, 0
        b, h, rows, most = self.lists
        return (h * rows if b > 1 else 0), (rows if h > 1 else 0), most


@functools.cache
def source() -> str:
    """Return the CUDA C++ source of the template."""
    return Path(__file__).with_suffix(".cuh").read_text()


def attention(
    problem: Problem,
    q: te.Tensor,
    k: te.Tensor,
    v: te.Tensor,
    mask: te.Tensor | None,
    blocks: te.Tensor | None = None,
    counts: te.Tensor | None = None,
) -> te.Tensor:
    """The result [B, H, L, F], contiguous."""
    from tvm.backend.cuda.op import cuda_func_call

    def body(inputs: Any, outputs: Any) -> Any:
        remaining = iter([b.data for b in inputs[3:]])
        pointers = [b.data for b in inputs[:3]]
        pointers += [inputs[0].data if t is None else next(remaining) for t in (mask, blocks, counts)]
        numbers = [tirx.const(x, "float32" if isinstance(x, float) else "int64") for x in problem.arguments]
        call = cuda_func_call(problem.function, *pointers, outputs[0].data, *numbers, source_code=source())
        statement = tirx.Evaluate(call)
        for axis, extent in zip(("threadIdx.x", "blockIdx.y", "blockIdx.x"), (THREADS, *reversed(problem.grid))):
            statement = tirx.AttrStmt(te.thread_axis(axis), "thread_extent", tirx.const(extent, "int32"), statement)
        return statement

    inputs = [q, k, v, *(t for t in (mask, blocks, counts) if t is not None)]
    shape = [*problem.q.shape[:3], problem.v.shape[3]]
    return te.extern([shape], inputs, body, name="flash_attention", dtype=problem.dtype)
