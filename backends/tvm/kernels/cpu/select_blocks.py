"""Lists of the blocks of keys that look most promising: ``thresher::select_blocks`` as one loop over heads.

The rank of a block is the number of those that come before it: with tens of blocks in a row counting is cheaper than sorting, and ties are
settled by the index, as in the reference. With groups the scores of blocks outside the best groups are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.kernels.building import (
    MASKED_SCORE,
    argument,
    broadcast,
    buffer,
    f32,
    function,
    i32,
    i64,
    store,
    vectors,
)
from thresher.backends.tvm.kernels.cpu import elementwise
from thresher.backends.tvm.kernels.cpu.streamed_attention import Operand

FORCED_SCORE = 3.0e38  # in the place of the score of a block that is listed in any case


@dataclass(frozen=True)
class Problem:
    """One selection. ``keys``: the shape of the boolean mask of keys, [B or 1, 1, 1, S]."""

    q: Operand
    k: Operand
    keys: tuple[int, ...] | None
    block_q: int
    block_k: int
    scale: float
    most: int
    causal: bool
    group: int = 1  # blocks of a group; 1: there are no groups


def kernel(problem: Problem, lanes: int) -> tirx.PrimFunc:
    """Return the function (q, k[, keys], forced, keep, mass[, groups], blocks, counts)."""
    return _Kernel(problem, lanes).build()


class _Kernel:
    def __init__(self, problem: Problem, lanes: int):
        self.p, self.lanes = problem, lanes
        self.batch, self.heads, rows, self.width = problem.q.shape
        self.rows, self.columns = -(-rows // problem.block_q), -(-problem.k.shape[2] // problem.block_k)
        self.groups = -(-self.columns // problem.group) if problem.group > 1 else 0

    def build(self) -> tirx.PrimFunc:
        p, grid = self.p, (self.rows, self.columns)
        with function() as builder:
            q, k = argument("q", p.q.stored), argument("k", p.k.stored)
            keys = argument("keys", p.keys, "bool") if p.keys else None
            self.forced = argument("forced", (1, self.heads, *grid), "bool")
            self.keep = argument("keep", (self.heads,), "int64")
            self.mass = argument("mass", (self.heads,))
            best: Any = argument("groups", (self.heads,), "int64") if self.groups else None
            self.blocks = argument("blocks", (self.batch, self.heads, self.rows, p.most), "int32")
            self.counts = argument("counts", (self.batch, self.heads, self.rows), "int32")
            with T.parallel(self.batch * self.heads) as task:
                b, h = task // self.heads, task % self.heads
                q_means, k_means = buffer(self.rows * self.width), buffer(self.columns * self.width)
                there = buffer(self.columns)
                of_k = T.floordiv(h, self.heads // p.k.shape[1])
                self.means(p.q, q, b, h, p.block_q, q_means, None, None)
                self.means(p.k, k, b, of_k, p.block_k, k_means, there, keys)
                if self.groups:
                    g_means, some, coarse = (buffer(n) for n in (self.groups * self.width, self.groups, self.groups))
                    self.means(p.k, k, b, of_k, p.block_k * p.group, g_means, some, keys)
                    self.good = buffer(self.groups)
                self.scores, self.weights, self.order, self.taken = (buffer(self.columns) for _ in range(4))
                with T.serial(self.rows) as i:
                    if self.groups:
                        with T.serial(self.groups) as g:
                            self.score(i, g, p.block_k * p.group, q_means, g_means, some, coarse)
                        self.best_groups(coarse, best[h])
                    with T.serial(self.columns) as j:
                        if self.groups:
                            wanted = tirx.any(self.forced[0, h, i, j], self.good[T.floordiv(j, p.group)] > f32(0.0))
                            store(self.scores, f32(MASKED_SCORE), j)
                            with T.If(wanted), T.Then():
                                self.score(i, j, p.block_k, q_means, k_means, there, self.scores)
                        else:
                            self.score(i, j, p.block_k, q_means, k_means, there, self.scores)
                    self.weigh(h, i)
                    self.rank(h, i)
                    self.list(b, h, i)
        return builder.get()

    def means(self, operand: Operand, x: Any, b: Any, h: Any, block: int, to: Any, there: Any, keys: Any) -> None:
        """Store the mean of each block of rows and, if asked for, how many of a block are ``there``."""
        length = operand.shape[2]
        with T.serial(-(-length // block)) as j:
            with vectors(self.width, self.lanes) as e:
                store(to, f32(0.0), j * self.width + e)
            count = buffer(1)
            store(count, f32(0.0), i64(0))
            with T.serial(block) as s, T.If(self.exists(b, j * block + s, length, keys)), T.Then():
                store(count, count[i64(0)] + f32(1.0), i64(0))
                with vectors(self.width, self.lanes) as e:
                    value = x[tuple(operand.at(x, b, h, j * block + s, e))]
                    store(to, to[j * self.width + e] + value, j * self.width + e)
            with vectors(self.width, self.lanes) as e:
                store(to, to[j * self.width + e] / tirx.max(count[i64(0)], f32(1.0)), j * self.width + e)
            if there is not None:
                store(there, count[i64(0)], j)

    def exists(self, b: Any, s: Any, length: int, keys: Any) -> Any:
        inside = s < length
        if keys is None:
            return inside
        return tirx.all(inside, keys[broadcast((b, i64(0), i64(0), tirx.min(s, length - 1)), keys.shape)])

    def score(self, i: Any, j: Any, block_k: int, q_means: Any, k_means: Any, there: Any, to: Any) -> None:
        """Store the score of block ``j`` for row ``i``, MASKED_SCORE where it may not be listed."""
        total = buffer(1)
        store(total, f32(0.0), i64(0))
        with T.serial(self.width) as e:
            product = q_means[i * self.width + e] * k_means[j * self.width + e]
            store(total, total[i64(0)] + product, i64(0))
        possible = there[j] > f32(0.0)
        if self.p.causal:
            possible = tirx.all(possible, j * block_k <= i * self.p.block_q + self.p.block_q - 1)
        store(to, tirx.Select(possible, total[i64(0)] * f32(self.p.scale), f32(MASKED_SCORE)), j)

    def best_groups(self, coarse: Any, best: Any) -> None:
        """Set ``good`` to 1 where a group is among the ``best`` of highest scores."""
        with T.serial(self.groups) as g:
            rank = buffer(1, "int64")
            store(rank, i64(0), i64(0))
            with T.serial(self.groups) as other:
                same = tirx.all(coarse[other] == coarse[g], other < g)
                ahead = tirx.any(coarse[other] > coarse[g], same)
                store(rank, rank[i64(0)] + T.cast(ahead, "int64"), i64(0))
            store(self.good, T.cast(rank[i64(0)] < best, "float32"), g)

    def weigh(self, h: Any, i: Any) -> None:
        """Store exp of the scores of row ``i``; forced blocks come first in ``order``."""
        top = buffer(1)
        store(top, f32(MASKED_SCORE), i64(0))
        with T.serial(self.columns) as j:
            store(top, tirx.max(top[i64(0)], self.scores[j]), i64(0))
        with T.serial(self.columns) as j:
            possible, forced = self.scores[j] > f32(MASKED_SCORE), self.forced[0, h, i, j]
            weight = elementwise.named(self.scores[j] - top[i64(0)], elementwise.short_exp)
            store(self.weights, tirx.Select(possible, weight, f32(0.0)), j)
            store(self.order, tirx.Select(tirx.all(possible, forced), f32(FORCED_SCORE), self.scores[j]), j)

    def rank(self, h: Any, i: Any) -> None:
        """Set ``taken`` to 1 where a block is listed."""
        total = buffer(1)
        store(total, f32(0.0), i64(0))
        with T.serial(self.columns) as j:
            store(total, total[i64(0)] + self.weights[j], i64(0))
        with T.serial(self.columns) as j:
            store(self.taken, f32(0.0), j)
            with T.If(self.scores[j] > f32(MASKED_SCORE)), T.Then():
                rank, before = buffer(1, "int64"), buffer(1)
                store(rank, i64(0), i64(0))
                store(before, f32(0.0), i64(0))
                with T.serial(self.columns) as other:
                    same = tirx.all(self.order[other] == self.order[j], other < j)
                    ahead = tirx.any(self.order[other] > self.order[j], same)
                    store(rank, rank[i64(0)] + T.cast(ahead, "int64"), i64(0))
                    store(before, before[i64(0)] + tirx.Select(ahead, self.weights[other], f32(0.0)), i64(0))
                chosen = tirx.all(rank[i64(0)] < self.keep[h], before[i64(0)] < self.mass[h] * total[i64(0)])
                store(self.taken, T.cast(tirx.any(self.forced[0, h, i, j], chosen), "float32"), j)

    def list(self, b: Any, h: Any, i: Any) -> None:
        count = buffer(1, "int64")
        store(count, i64(0), i64(0))
        with T.serial(self.p.most) as c:
            store(self.blocks, i32(0), b, h, i, c)
        with T.serial(self.columns) as j:
            fits = tirx.all(self.taken[j] > f32(0.0), count[i64(0)] < self.p.most)
            with T.If(fits), T.Then():
                store(self.blocks, T.cast(j, "int32"), b, h, i, count[i64(0)])
                store(count, count[i64(0)] + i64(1), i64(0))
        store(self.counts, T.cast(count[i64(0)], "int32"), b, h, i)


def outputs(problem: Problem) -> Sequence[tuple[tuple[int, ...], str]]:
    """Return shapes and types of the two results."""
    shape = (*problem.q.shape[:2], -(-problem.q.shape[2] // problem.block_q))
    return ((*shape, problem.most), "int32"), (shape, "int32")
