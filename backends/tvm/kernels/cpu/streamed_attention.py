"""Attention in one pass over blocks of keys, which may be a few of them: blocks that are not listed are not read and not multiplied.

A task takes a tile of queries of one head. For every block of keys that it looks at:

    S^T = K Q^T                   [keys, queries]: a register holds the scores of several queries with one key
    m'  = max(m, max_s S^T)       everything of a row of queries is a register operation, nothing is summed across one
    P^T = exp(S^T - m'),  l' = l exp(m - m') + sum_s P^T
    O'  = O exp(m - m') + P V     [queries, channels]

and at the end O / l (online softmax: Milakov & Gimelshein, 2018; FlashAttention-2: Dao, 2023). Only the tile of queries is transposed; keys
and values are read as they are stored, with the heads outside or inside the tokens, and so is the result written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.building import (
    argument,
    broadcast,
    buffer,
    f32,
    function,
    i64,
    loop,
    store,
    vectors,
)
from thresher.backends.tvm.kernels.cpu import elementwise

MASKED = -math.inf  # a score that is not there
FLOOR = -3.4028234663852886e38  # the top of a row before its first score: no score is under it
BLOCK = 64  # keys that are taken together
DEPTH = 4  # steps of a sum that are written out
ROWS = 4  # of a tile of sums


@dataclass(frozen=True)
class Operand:
    """A [B, H, L, E] value, stored so or, with ``heads_inside``, as [B, L, H, E]."""

    shape: tuple[int, int, int, int]
    heads_inside: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape as it is stored."""
        b, h, length, e = self.shape
        return (b, length, h, e) if self.heads_inside else self.shape

    def at(self, buffer: Any, b: Any, h: Any, row: Any, channel: Any) -> list[Any]:
        """Return the index of an element in the stored buffer."""
        return [b, row, h, channel] if self.heads_inside else [b, h, row, channel]


@dataclass(frozen=True)
class Problem:
    """One attention. ``mask``: the shape of what is added, [B or 1, H or 1, S, L or 1], L in whole tiles; ``lists``: that of the lists of
    key blocks, [B or 1, H or 1, query blocks, most]."""

    q: Operand
    k: Operand
    v: Operand
    heads_inside: bool  # of the result
    scale: float
    causal: bool = False
    mask: tuple[int, ...] | None = None
    lists: tuple[int, ...] | None = None
    block_q: int = BLOCK
    block_k: int = BLOCK
    softcap: float | None = None
    skip: float | None = None

    @property
    def result(self) -> Operand:
        """The result, [B, H, L, F], and how it is stored."""
        return Operand((*self.q.shape[:3], self.v.shape[3]), self.heads_inside)


def tile_of(problem: Problem, machine: CpuInfo) -> int:
    """Return the queries of a task: whole registers, within one block of queries, few beyond the last."""
    rows = problem.q.shape[2]
    if problem.skip is not None:
        return problem.block_q  # what is skipped is decided for a block
    fit = [t for t in range(machine.lanes, 4 * machine.lanes + 1, machine.lanes)]
    fit = [t for t in fit if not problem.lists or problem.block_q % t == 0]
    return min(fit or [machine.lanes], key=lambda t: (-(-rows // t) * t * (1 + 0.04 * (4 * machine.lanes / t - 1)), -t))


def block_of(keys: int) -> int:
    """Return the keys that are taken together where there are no lists: about BLOCK, and evenly."""
    parts = max(1, round(keys / BLOCK))
    return -(-keys // (parts * ROWS)) * ROWS


def kernel(problem: Problem, machine: CpuInfo) -> tirx.PrimFunc:
    """Return the function (q, k, v[, mask][, blocks, counts], result)."""
    return _Kernel(problem, machine).build()


class _Kernel:
    def __init__(self, problem: Problem, machine: CpuInfo):
        self.p, self.lanes = problem, machine.lanes
        self.widest = 4 if machine.registers > 16 else 3  # registers of a row of a tile of sums
        self.tile = tile_of(problem, machine)
        self.vectors = self.tile // self.lanes
        self.batch, self.heads, self.rows, self.width = problem.q.shape
        self.keys, self.out = problem.k.shape[2], problem.v.shape[3]
        self.block = problem.block_k
        self.padded = -(-self.block // ROWS) * ROWS

    # ------------------------------------------------------------------ the function

    def build(self) -> tirx.PrimFunc:
        p = self.p
        with function() as builder:
            self.q, self.k, self.v = (argument(name, o.stored) for name, o in (("q", p.q), ("k", p.k), ("v", p.v)))
            self.mask: Any = argument("mask", p.mask) if p.mask else None
            self.blocks: Any = argument("blocks", p.lists, "int32") if p.lists else None
            self.counts: Any = argument("counts", p.lists[:3], "int32") if p.lists else None
            self.result = argument("result", p.result.stored)
            tiles = -(-self.rows // self.tile)
            with T.parallel(self.batch * self.heads * tiles) as task:
                b, h = task // (self.heads * tiles), task // tiles % self.heads
                self.task(b, h, self.order(task % tiles, tiles))
        return builder.get()

    def order(self, t: Any, tiles: int) -> Any:
        """Return the tile of a task; causal: long and short rows in turn, so that each thread gets as much."""
        return tirx.Select(t % 2 == 0, t // 2, tiles - 1 - t // 2) if self.p.causal else t

    def task(self, b: Any, h: Any, tile: Any) -> None:
        scratch = {"queries": self.width * self.tile, "scores": self.padded * self.tile, "sums": self.tile * self.out}
        self.queries, self.scores, self.sums = (buffer(size) for size in scratch.values())
        self.top, self.total, self.fade, self.peak = (buffer(self.tile) for _ in range(4))
        first = tile * self.tile
        self.transpose_queries(b, h, first)
        with self.over_queries() as i:
            store(self.top, f32(FLOOR), i)
            store(self.total, f32(0.0), i)
        with T.serial(self.tile) as i, vectors(self.out, self.lanes) as c:
            store(self.sums, f32(0.0), i * self.out + c)
        group = self.heads // self.p.k.shape[1]
        with self.listed(b, h, first) as block:
            self.step(b, h, T.floordiv(h, group), first, block)
        with T.serial(self.tile) as i, T.If(first + i < self.rows), T.Then(), vectors(self.out, self.lanes) as c:
            total = self.total[i]
            inverse = tirx.Select(total > f32(0.0), f32(1.0) / total, f32(0.0))
            T.buffer_store(
                self.result, self.sums[i * self.out + c] * inverse, self.p.result.at(self.result, b, h, first + i, c)
            )

    # ------------------------------------------------------------------ the stages

    def transpose_queries(self, b: Any, h: Any, first: Any) -> None:
        with T.serial(self.tile) as i:
            row = tirx.min(first + i, self.rows - 1)
            with T.serial(self.width) as e:
                value = self.q[tuple(self.p.q.at(self.q, b, h, row, e))] * f32(self.p.scale)
                store(self.queries, value, e * self.tile + i)

    @contextmanager
    def listed(self, b: Any, h: Any, first: Any) -> Iterator[Any]:
        """Loop over the blocks of keys that this tile looks at."""
        count = -(-self.keys // self.block)
        if self.p.lists:
            index = broadcast((b, h, first // self.p.block_q), self.counts.shape)
            with T.serial(T.cast(self.counts[index], "int64")) as c:
                yield T.cast(self.blocks[(*index, c)], "int64")
            return
        if self.p.causal:
            last = tirx.min(first + self.tile, self.rows) - 1
            count = tirx.min(last // self.block + 1, i64(count))
        with T.serial(count) as c:
            yield c

    def step(self, b: Any, h: Any, group: Any, first: Any, block: Any) -> None:
        """Compute the scores of one block of keys and, unless it is skipped, its part of the result."""
        start = block * self.block
        whole = self.keys % self.block == 0
        n = i64(self.block) if whole else tirx.min(i64(self.block), self.keys - start)
        steps = -(-self.block // ROWS) if whole else T.floordiv(n + ROWS - 1, ROWS)
        self.score(b, group, start, steps)
        self.bias(b, h, first, start, n, steps)
        self.peaks(steps)
        if self.p.skip is None:
            self.take(b, group, start, steps)
        else:
            with T.If(self.nearest_top() >= f32(-self.p.skip)), T.Then():
                self.take(b, group, start, steps)

    def take(self, b: Any, group: Any, start: Any, steps: Any) -> None:
        """Add the block's part of the result."""
        self.softmax(steps)
        self.mix(b, group, start, steps)

    def score(self, b: Any, group: Any, start: Any, steps: Any) -> None:
        """Compute S^T for ``steps`` times ROWS keys."""
        with T.serial(steps) as step:
            s = [tirx.min(start + step * ROWS + r, self.keys - 1) for r in range(ROWS)]
            for registers in self.chunks(self.tile):
                sums = Sums(ROWS, registers)
                sums.fill(lambda r, c: f32(0.0))
                with loop(self.width, DEPTH) as e:
                    sums.add(
                        lambda r: self.k[tuple(self.p.k.at(self.k, b, group, s[r], e))],
                        lambda c: self.queries[e * self.tile + c],
                    )
                sums.each(lambda r, c, value: store(self.scores, value, (step * ROWS + r) * self.tile + c))

    def bias(self, b: Any, h: Any, first: Any, start: Any, n: Any, steps: Any) -> None:
        """Add the mask to the scores, and forbid what causality and the end of the keys forbid."""
        p = self.p
        if p.softcap is not None or self.mask is not None:
            with T.serial(steps * ROWS) as s, self.over_queries() as i:
                value = self.scores[s * self.tile + i]
                if p.softcap is not None:
                    value = elementwise.named(value / f32(p.softcap), elementwise.tanh) * f32(p.softcap)
                if self.mask is not None:
                    key = tirx.min(start + s, self.keys - 1)
                    index = broadcast((b, h, key, first + i), self.mask.shape)
                    value = value + self.mask[index]
                store(self.scores, value, s * self.tile + i)
        if p.causal:
            with T.If(start + n - 1 > first), T.Then(), T.serial(steps * ROWS) as s, self.over_queries() as i:
                value = tirx.Select(start + s <= first + i, self.scores[s * self.tile + i], f32(MASKED))
                store(self.scores, value, s * self.tile + i)
        if self.keys % ROWS:
            with T.If(n < steps * ROWS), T.Then(), T.serial(steps * ROWS - n) as s, self.over_queries() as i:
                store(self.scores, f32(MASKED), (n + s) * self.tile + i)

    def peaks(self, steps: Any) -> None:
        """Store the largest score of each query in this block."""
        with T.serial(self.vectors) as j:
            peak = buffer(self.lanes)
            with self.register() as i:
                store(peak, f32(MASKED), i)
            with T.serial(steps * ROWS) as s, self.register() as i:
                store(peak, tirx.max(peak[i], self.scores[s * self.tile + j * self.lanes + i]), i)
            with self.register() as i:
                store(self.peak, peak[i], j * self.lanes + i)

    def nearest_top(self) -> Any:
        """Return how far the block's scores stay under the tops of their rows, at best; not positive."""
        nearest = buffer(1)
        store(nearest, f32(MASKED), i64(0))
        with T.serial(self.tile) as i:
            below = self.peak[i] - tirx.max(self.top[i], self.peak[i])
            store(
                nearest, tirx.max(nearest[i64(0)], tirx.Select(self.peak[i] > f32(MASKED), below, f32(MASKED))), i64(0)
            )
        return nearest[i64(0)]

    def softmax(self, steps: Any) -> None:
        """Replace S^T by P^T, and update the sums and tops that go with it."""
        with T.serial(self.vectors) as j:
            top, total = buffer(self.lanes), buffer(self.lanes)
            with self.register() as i:
                index = j * self.lanes + i
                store(top, tirx.max(self.top[index], self.peak[index]), i)
                store(self.fade, elementwise.named(self.top[index] - top[i], elementwise.short_exp), index)
                store(total, self.total[index] * self.fade[index], i)
                store(self.top, top[i], index)
            with T.serial(steps * ROWS) as s, self.register() as i:
                index = s * self.tile + j * self.lanes + i
                store(self.scores, elementwise.named(self.scores[index] - top[i], elementwise.short_exp), index)
                store(total, total[i] + self.scores[index], i)
            with self.register() as i:
                store(self.total, total[i], j * self.lanes + i)

    def mix(self, b: Any, group: Any, start: Any, steps: Any) -> None:
        """Compute O = O exp(m - m') + P V."""
        with T.serial(self.tile // ROWS) as t:
            for registers in self.chunks(self.out):
                sums = Sums(ROWS, registers)
                sums.fill(lambda r, c: self.sums[(t * ROWS + r) * self.out + c] * self.fade[t * ROWS + r])
                with T.serial(steps) as step, T.unroll(ROWS) as u:
                    self.weigh(sums, b, group, start, step * ROWS + u, t)
                sums.each(lambda r, c, value: store(self.sums, value, (t * ROWS + r) * self.out + c))

    def chunks(self, size: int) -> list[list[tuple[int, int]]]:
        """Return a row of ``size`` elements as registers (offset, length), as many at a time as a tile of sums takes, and evenly."""
        registers = [(c, min(self.lanes, size - c)) for c in range(0, size, self.lanes)]
        count = -(-len(registers) // self.widest)
        share = -(-len(registers) // count)
        return [registers[i : i + share] for i in range(0, len(registers), share)]

    def weigh(self, sums: Sums, b: Any, group: Any, start: Any, s: Any, t: Any) -> None:
        """Add the values of one key, with the weights that the queries of tile ``t`` give it."""
        key = tirx.min(start + s, self.keys - 1)
        sums.add(
            lambda r: self.scores[s * self.tile + t * ROWS + r],
            lambda c: self.v[tuple(self.p.v.at(self.v, b, group, key, c))],
        )

    def over_queries(self) -> Any:
        return vectors(self.tile, self.lanes)

    def register(self) -> Any:
        return T.vectorized(self.lanes)


class Sums:
    """A tile of sums in registers: ``rows`` x ``parts`` (offset and length of each register)."""

    def __init__(self, rows: int, parts: Sequence[tuple[int, int]]):
        self.parts = parts
        self.buffers = [[buffer(length) for _, length in parts] for _ in range(rows)]

    def each(self, use: Callable[[int, Any, Any], None]) -> None:
        """Call ``use(row, column, sum)`` in vector loops."""
        for r, row in enumerate(self.buffers):
            for (offset, length), sums in zip(self.parts, row):
                with T.vectorized(length) as i:
                    use(r, offset + i, sums[i])

    def fill(self, value: Callable[[int, Any], Any]) -> None:
        """Set every sum to ``value(row, column)``."""
        for r, row in enumerate(self.buffers):
            for (offset, length), sums in zip(self.parts, row):
                with T.vectorized(length) as i:
                    store(sums, value(r, offset + i), i)

    def add(self, left: Callable[[int], Any], right: Callable[[Any], Any]) -> None:
        """Add one step of the products: left(row) * right(column)."""
        for r, row in enumerate(self.buffers):
            for (offset, length), sums in zip(self.parts, row):
                with T.vectorized(length) as i:
                    store(sums, sums[i] + left(r) * right(offset + i), i)
