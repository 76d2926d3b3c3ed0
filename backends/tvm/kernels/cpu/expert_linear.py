"""Linear layers of which each row takes the one of its expert: the rows are grouped by expert, and each group is a product of its own.

First, in one thread, the rows of every expert are listed (a counting sort), and the groups are cut into tiles. Then the rows of each tile
are laid out side by side, [k, rows], so that a step of the product reads them at one address. Then the products: of every expert each
thread has an equal part of its (panel, tile) pairs, whatever the router chose, and it reads a panel of the weight once for all tiles of
the expert that it computes. A tile is as high as the registers hold sums for; the last one of a group is cut to what it needs, for a
token that is decoded brings one row to each of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.building import argument, buffer, f32, function, i64, store
from thresher.backends.tvm.kernels.cpu.gemm import Tile, pack

VECTORS = 2  # registers of a row of a tile
STEP = 4  # steps of a sum that are written out, and registers of sums of a low tile that do not wait for each other


@dataclass(frozen=True)
class Problem:
    """Products of ``rows`` rows with ``experts`` weights [n, k]; ``sharing``: neighbouring rows that have one row of x."""

    rows: int
    sharing: int
    experts: int
    n: int
    k: int
    bias: bool


def packed(weight: np.ndarray, machine: CpuInfo) -> np.ndarray:
    """Return a weight [E, N, K] as [E, panels, K, columns]."""
    tile = Tile(1, VECTORS, machine.lanes)
    return np.stack([pack(one, tile) for one in weight])


def kernel(problem: Problem, machine: CpuInfo) -> tirx.PrimFunc:
    """Return the function (x [rows / sharing, k], experts [rows], packed weight, [bias [E, n],] out [rows, n])."""
    panels = -(-problem.n // (VECTORS * machine.lanes))
    with function() as builder:
        x = argument("x", (problem.rows // problem.sharing, problem.k))
        experts = argument("experts", (problem.rows,), "int64")
        weight = argument("weight", (problem.experts, panels, problem.k, VECTORS * machine.lanes))
        bias = argument("bias", (problem.experts, problem.n)) if problem.bias else None
        out = argument("out", (problem.rows, problem.n))
        body = _Body(problem, machine, x, experts, weight, bias, out)
        body.group_rows()
        with T.parallel(body.most_tiles) as tile, T.If(tile < body.tiles[i64(0)]), T.Then():
            body.lay_out(tile)
        with T.parallel(machine.threads) as task:
            body.zeros(task)
            with T.serial(problem.experts) as expert:
                body.products(task, expert)
    return builder.get()


class _Body:
    """The parts of the kernel. Expert E stands for the rows that have none."""

    def __init__(self, problem: Problem, machine: CpuInfo, x: Any, experts: Any, weight: Any, bias: Any, out: Any):
        self.problem, self.machine = problem, machine
        self.x, self.experts, self.weight, self.bias, self.out = x, experts, weight, bias, out
        count, rows = problem.experts, problem.rows
        most = max(1, machine.accumulators // VECTORS)
        self.high = -(-rows // -(-rows // most))  # rows of a tile
        self.heights = sorted({h for h in (1, 2, 4) if h < self.high} | {self.high})
        self.most_tiles = min(rows, rows // self.high + count)
        self.start = buffer(count + 2, "int64")  # of each expert's rows in the list
        self.listed = buffer(rows, "int64")  # the rows, expert by expert
        self.first = buffer(count + 1, "int64")  # the first tile of each expert
        self.tiles = buffer(1, "int64")
        self.tile_start, self.tile_rows = (buffer(self.most_tiles, "int64") for _ in range(2))
        self.side_by_side = buffer(self.most_tiles * problem.k * self.high)

    # ------------------------------------------------------------------ grouping

    def expert_of(self, row: Any) -> Any:
        """Return the expert of a row."""
        expert, count = self.experts[row], i64(self.problem.experts)
        return tirx.Select(tirx.all(expert >= 0, expert < count), expert, count)

    def group_rows(self) -> None:
        """List the rows by expert, in their order, and the tiles."""
        count, rows = self.problem.experts, self.problem.rows
        slot = buffer(count + 1, "int64")
        with T.serial(count + 2) as e:
            store(self.start, i64(0), e)
        with T.serial(rows) as row:
            expert = self.expert_of(row)
            store(self.start, self.start[expert + 1] + 1, expert + 1)
        with T.serial(count + 1) as e:
            store(slot, self.start[e], e)
            store(self.start, self.start[e + 1] + self.start[e], e + 1)
        with T.serial(rows) as row:
            expert = self.expert_of(row)
            store(self.listed, row, slot[expert])
            store(slot, slot[expert] + 1, expert)
        store(self.tiles, i64(0), i64(0))
        with T.serial(count) as e:
            size = self.start[e + 1] - self.start[e]
            store(self.first, self.tiles[i64(0)], e)
            with T.serial(T.floordiv(size + self.high - 1, i64(self.high))) as t:
                store(self.tile_start, self.start[e] + t * self.high, self.tiles[i64(0)])
                store(self.tile_rows, tirx.min(size - t * self.high, i64(self.high)), self.tiles[i64(0)])
                store(self.tiles, self.tiles[i64(0)] + 1, i64(0))
        store(self.first, self.tiles[i64(0)], i64(count))

    def by_height(self, tile: Any, body: Any) -> None:
        """Run ``body(height)`` for the least height that has all rows of a tile."""

        def case(heights: list[int]) -> None:
            if len(heights) == 1:
                body(heights[0])
                return
            with T.If(self.tile_rows[tile] <= heights[0]):
                with T.Then():
                    body(heights[0])
                with T.Else():
                    case(heights[1:])

        case(self.heights)

    def lay_out(self, tile: Any) -> None:
        """Copy the rows of a tile side by side; those that it lacks are its last one again."""
        k = self.problem.k

        def copy(height: int) -> None:
            last = self.tile_rows[tile] - 1
            rows = [self.listed[self.tile_start[tile] + tirx.min(i64(r), last)] for r in range(height)]
            rows = [T.floordiv(row, i64(self.problem.sharing)) for row in rows]
            with T.serial(k) as j:
                for r, row in enumerate(rows):
                    store(self.side_by_side, self.x[row, j], tile * (k * self.high) + j * height + r)

        self.by_height(tile, copy)

    # ------------------------------------------------------------------ products

    def zeros(self, task: Any) -> None:
        """Store zeros in the rows that have no expert; each thread has a part of them."""
        count, threads = self.problem.experts, self.machine.threads
        first, size = self.start[i64(count)], self.start[i64(count + 1)] - self.start[i64(count)]
        low, high = T.floordiv(size * task, i64(threads)), T.floordiv(size * (task + 1), i64(threads))
        with T.serial(high - low) as i, T.serial(self.problem.n) as column:
            store(self.out, f32(0.0), self.listed[first + low + i], column)

    def products(self, task: Any, expert: Any) -> None:
        """Compute a thread's part of an expert's (panel, tile) pairs; a part that is smaller is another thread's at the next expert."""
        panels, threads = int(self.weight.shape[1]), i64(self.machine.threads)
        tiles = self.first[expert + 1] - self.first[expert]
        share = T.floormod(task + expert, threads)
        low = T.floordiv(panels * tiles * share, threads)
        with T.serial(T.floordiv(panels * tiles * (share + 1), threads) - low) as i:
            panel, tile = T.floordiv(low + i, tiles), self.first[expert] + T.floormod(low + i, tiles)
            self.by_height(tile, lambda height: self.product(expert, panel, tile, height))

    def product(self, expert: Any, panel: Any, tile: Any, height: int) -> None:
        """Compute one panel's columns of the rows of a tile."""
        k, lanes, columns = self.problem.k, self.machine.lanes, VECTORS * self.machine.lanes
        apart = max(1, STEP // height) if k % STEP == 0 else 1  # sums of their own for neighbouring steps
        total = buffer(apart * height * columns)
        for v in range(apart * height * VECTORS):
            with T.vectorized(lanes) as e:
                store(total, f32(0.0), v * lanes + e)
        base = tile * (k * self.high)
        with T.serial(k // apart) as outer:
            for u in range(apart):
                j = outer * apart + u
                for row in range(height):
                    for v in range(VECTORS):
                        with T.vectorized(lanes) as e:
                            at = ((u * height + row) * VECTORS + v) * lanes + e
                            x = self.side_by_side[base + j * height + row]
                            store(total, total[at] + x * self.weight[expert, panel, j, v * lanes + e], at)
        for at in range(0, height * columns, lanes):
            for u in range(1, apart):
                with T.vectorized(lanes) as e:
                    store(total, total[at + e] + total[u * height * columns + at + e], at + e)
        for row in range(height):
            with T.If(self.tile_rows[tile] > row), T.Then():
                self.store_row(total, row, self.listed[self.tile_start[tile] + row], expert, panel * columns)

    def store_row(self, total: Any, row: int, to: Any, expert: Any, start: Any) -> None:
        """Store the columns of a row, with its expert's bias."""
        lanes, columns, n = self.machine.lanes, VECTORS * self.machine.lanes, self.problem.n

        def finished(at: Any, column: Any) -> Any:
            value = total[row * columns + at]
            return value if self.bias is None else value + self.bias[expert, column]

        if n % columns == 0:
            for v in range(VECTORS):
                with T.vectorized(lanes) as e:
                    at = v * lanes + e
                    store(self.out, finished(at, start + at), to, start + at)
        else:
            with T.serial(columns) as c, T.If(start + c < n), T.Then():
                store(self.out, finished(c, start + c), to, start + c)
