"""Products with a weight that is full of zeros, of which only the rest is stored.

rows     of each output its inputs and weights, one list after the other. One row of x: a sum of products at the indices of the list.
         Several rows: x is transposed first, so that an input of all rows is one register, and each entry of the list is one
         multiplication of it; some registers of rows and a group of outputs at a time, which are transposed back where they are stored.
panels   of a panel of outputs (registers) the inputs that any of them has: the innermost loop is that of a dense product, over a list.
runs     of each output runs of as many neighbouring inputs as a register holds, for one row of x: x is read in registers, too.

Lists are padded with zeros to whole steps. Each thread has outputs of about as many entries as the others'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.building import argument, buffer, f32, function, i64, store
from thresher.backends.tvm.kernels.cpu.sparse_linear import Problem

STEP = 4  # entries that are added to sums of their own
MAX_REGISTERS = 8  # registers of rows at a time
SQUARE_SIDE = 16  # inputs that are turned round together
VECTORS = 2  # registers of a panel's outputs


@dataclass(frozen=True)
class Packed:
    """A packed weight: ``values`` [entries, width] and their inputs ``index`` [entries] (of a run the first one).

    ``start`` [count + 1] says where each output or panel begins, ``shares`` [threads + 1] where each thread does, in groups of outputs.
    """

    values: np.ndarray
    index: np.ndarray
    start: np.ndarray
    shares: np.ndarray
    group: int

    @property
    def arrays(self) -> list[np.ndarray]:
        """The arrays in the order of the kernel's parameters."""
        return [self.values, self.index, self.start, self.shares]


def pack(weight: np.ndarray, layout: str, machine: CpuInfo, group: int = 1) -> Packed:
    """Pack a weight [N, K] by ``layout`` (rows, panels, runs); a thread has whole groups of outputs."""
    n, k = weight.shape
    lanes = machine.lanes
    if layout == "panels":
        columns = VECTORS * lanes
        whole = np.zeros((-(-n // columns) * columns, k), np.float32)
        whole[:n] = weight
        blocks = whole.reshape(-1, columns, k).transpose(0, 2, 1)  # [panels, K, columns]
    elif layout == "runs":
        whole = np.zeros((n, -(-k // lanes) * lanes), np.float32)
        whole[:, :k] = weight
        blocks = whole.reshape(n, -1, lanes)
    else:
        blocks = weight[:, :, None]
    used = (blocks != 0).any(-1)
    step = lanes if layout == "rows" else STEP
    counts = -(-used.sum(1) // step) * step
    start = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    values = np.zeros((max(STEP, int(start[-1])), blocks.shape[2]), np.float32)
    index = np.zeros(len(values), np.int32)
    for i, mine in enumerate(used):
        places = np.flatnonzero(mine)
        values[start[i] : start[i] + len(places)] = blocks[i, places]
        index[start[i] : start[i] + len(places)] = places * (lanes if layout == "runs" else 1)
    return Packed(values, index, start, _shares(start, group, machine.threads), group)


def group_of(m: int, n: int, machine: CpuInfo) -> int:
    """Return how many outputs are stored together: a register of them, if every thread has some groups."""
    return next((g for g in (16, 8, 4, 2) if m > 1 and g <= machine.lanes and n >= 4 * g * machine.threads), 1)


def _shares(start: np.ndarray, group: int, threads: int) -> np.ndarray:
    """Return where to cut so that the entries are about equal; an output costs as much as an entry."""
    start = np.append(start[:-1:group], start[-1])
    cost = start + group * np.arange(len(start))
    wanted = cost[-1] * np.arange(1, threads) / threads
    return np.concatenate([[0], np.searchsorted(cost, wanted), [len(start) - 1]]).astype(np.int64)


Finish = Callable[..., Any]


def kernel(problem: Problem, packed: Packed, layout: str, machine: CpuInfo, finish: Finish) -> tirx.PrimFunc:
    """Return the function (x [m, k], values, index, start, shares, *more, out [m, n])."""
    with function() as builder:
        x = argument("x", (problem.m, problem.k))
        values, index = argument("values", packed.values.shape), argument("index", packed.index.shape, "int32")
        start, shares = argument("start", packed.start.shape, "int64"), argument("shares", packed.shares.shape, "int64")
        more = [argument(f"more{i}", o.shape, o.dtype) for i, o in enumerate(problem.more)]
        out = argument("out", (problem.m, problem.n))
        body = _Body(problem, machine, x, values, index, start, lambda v, r, c: finish(v, r, c, *more), out)
        turned = body.turn() if layout == "rows" and problem.m > 1 else None
        with T.parallel(machine.threads) as task:
            first, last = shares[task], shares[task + 1]
            with T.serial(1 if turned is None else body.rows.blocks) as block, T.serial(last - first) as one:
                at = first + one
                if layout == "panels":
                    body.panel(at)
                elif layout == "runs":
                    body.runs(at)
                elif turned is None:
                    body.row(at)
                else:
                    body.part(turned, block, at, packed.group)
    return builder.get()


@dataclass(frozen=True)
class Rows:
    """The partition of m rows into ``blocks`` of ``count`` registers of ``width`` rows."""

    width: int
    count: int
    blocks: int

    @staticmethod
    def of(m: int, lanes: int) -> Rows:
        """Return the partition with the fewest blocks, evenly filled."""
        width = width_of(m, lanes)
        registers = -(-m // width)
        blocks = -(-registers // MAX_REGISTERS)
        return Rows(width, -(-registers // blocks), blocks)

    @property
    def high(self) -> int:
        """The number of rows of a block."""
        return self.count * self.width


def width_of(m: int, lanes: int) -> int:
    """Return the number of rows in a register: no wider than need be."""
    width = lanes
    while width > 4 and width // 2 >= m:
        width //= 2
    return width


@dataclass
class _Body:
    problem: Problem
    machine: CpuInfo
    x: Any
    values: Any
    index: Any
    start: Any
    finish: Finish
    out: Any

    def input_of(self, entry: Any) -> Any:
        return T.cast(self.index[entry], "int64")

    def steps(self, at: Any) -> Any:
        return T.floordiv(self.start[at + 1] - self.start[at], STEP)

    # ------------------------------------------------------------------ rows

    def row(self, n: Any) -> None:
        """Compute one output of one row of x."""
        lanes = self.machine.lanes
        total, whole = buffer(lanes), buffer(1)
        with T.vectorized(lanes) as e:
            store(total, f32(0.0), e)
        first = self.start[n]
        with T.serial(T.floordiv(self.start[n + 1] - first, lanes)) as i, T.vectorized(lanes) as e:
            entry = first + i * lanes + e
            store(total, total[e] + self.values[entry, 0] * self.x[0, self.index[entry]], e)
        store(whole, f32(0.0), i64(0))
        with T.unroll(lanes) as e:
            store(whole, whole[i64(0)] + total[e], i64(0))
        store(self.out, self.finish(whole[i64(0)], i64(0), n), i64(0), n)

    @property
    def rows(self) -> Rows:
        return Rows.of(self.problem.m, self.machine.lanes)

    def turn(self) -> Any:
        """Return x as [k, m], padded to whole blocks: squares of it at a time, so that every line of the cache is read once."""
        m, k, high = self.problem.m, self.problem.k, self.rows.high
        wide, side = self.rows.blocks * high, min(SQUARE_SIDE, k)
        turned, across = buffer(k * wide), -(-k // side)
        with T.parallel(self.rows.blocks * across) as square:
            left, top = T.floormod(square, across) * side, T.floordiv(square, across) * high
            with T.serial(high) as e, T.serial(side) as i:
                row, j = top + e, tirx.min(left + i, k - 1) if k % side else left + i
                value = self.x[tirx.min(row, m - 1), j] if wide != m else self.x[row, j]
                store(turned, tirx.Select(row < m, value, f32(0.0)) if wide != m else value, j * wide + row)
        return turned

    def part(self, turned: Any, block: Any, at: Any, group: int) -> None:
        """Compute a group of outputs of a block of rows."""
        first, high, n = block * self.rows.high, self.rows.high, self.problem.n
        tile = buffer(group * high)
        with T.serial(group) as j:
            self._sums(tile, j * high, turned, first, tirx.min(at * group + j, n - 1) if n % group else at * group + j)
        with T.serial(tirx.min(high, self.problem.m - first)) as e:
            if n % group:
                with T.serial(group) as j, T.If(at * group + j < n), T.Then():
                    self._stored(tile[j * high + e], first + e, at * group + j)
            else:
                with T.vectorized(group) as j:
                    self._stored(tile[j * high + e], first + e, at * group + j)

    def _stored(self, value: Any, row: Any, n: Any) -> None:
        store(self.out, self.finish(value, row, n), row, n)

    def _sums(self, tile: Any, offset: Any, turned: Any, first: Any, n: Any) -> None:
        """Compute one output of a block of rows, at an offset of the tile."""
        width, count = self.rows.width, self.rows.count
        wide = self.rows.blocks * self.rows.high
        apart = max(1, STEP // count)  # sums of their own for neighbouring entries, where there are few registers
        total = buffer(apart * count * width)
        for v in range(apart * count):
            with T.vectorized(width) as e:
                store(total, f32(0.0), v * width + e)
        with T.serial(self.steps(n)) as i:
            for u in range(STEP):
                entry = self.start[n] + i * STEP + u
                for v in range(count):
                    at = (u % apart * count + v) * width
                    with T.vectorized(width) as e:
                        value = turned[self.input_of(entry) * wide + first + v * width + e]
                        store(total, total[at + e] + self.values[entry, 0] * value, at + e)
        for v in range(count):
            for u in range(1, apart):
                with T.vectorized(width) as e:
                    store(total, total[v * width + e] + total[(u * count + v) * width + e], v * width + e)
            with T.vectorized(width) as e:
                store(tile, total[v * width + e], offset + v * width + e)

    # ------------------------------------------------------------------ runs

    def runs(self, n: Any) -> None:
        """Compute one output of one row of x: registers of inputs times registers of weights."""
        lanes, k = self.machine.lanes, self.problem.k
        total = buffer(STEP * lanes)
        for u in range(STEP):
            with T.vectorized(lanes) as e:
                store(total, f32(0.0), u * lanes + e)
        with T.serial(self.steps(n)) as i:
            for u in range(STEP):
                entry = self.start[n] + i * STEP + u
                with T.vectorized(lanes) as e:
                    first_input = self.input_of(entry) + e
                    value = self.x[0, first_input if k % lanes == 0 else tirx.min(first_input, k - 1)]
                    store(total, total[u * lanes + e] + self.values[entry, e] * value, u * lanes + e)
        whole = buffer(1)
        store(whole, f32(0.0), i64(0))
        with T.vectorized(lanes) as e:
            store(total, (total[e] + total[lanes + e]) + (total[2 * lanes + e] + total[3 * lanes + e]), e)
        with T.unroll(lanes) as e:
            store(whole, whole[i64(0)] + total[e], i64(0))
        store(self.out, self.finish(whole[i64(0)], i64(0), n), i64(0), n)

    # ------------------------------------------------------------------ panels

    def panel(self, p: Any) -> None:
        """Compute a panel of outputs, a tile of rows at a time."""
        m, lanes = self.problem.m, self.machine.lanes
        most = max(1, self.machine.accumulators // VECTORS)
        rows = -(-m // -(-m // most))
        with T.serial(-(-m // rows)) as tile:
            self._tile(p, tile * rows, rows, lanes)

    def _tile(self, p: Any, first: Any, rows: int, lanes: int) -> None:
        m, n, columns = self.problem.m, self.problem.n, VECTORS * lanes
        apart = max(1, STEP // rows)
        total = buffer(apart * rows * columns)
        for v in range(apart * rows * VECTORS):
            with T.vectorized(lanes) as e:
                store(total, f32(0.0), v * lanes + e)
        with T.serial(self.steps(p)) as i:
            for u in range(STEP):
                entry = self.start[p] + i * STEP + u
                for row in range(rows):
                    source = tirx.min(first + row, m - 1) if m % rows else first + row
                    for v in range(VECTORS):
                        at = ((u % apart * rows + row) * VECTORS + v) * lanes
                        with T.vectorized(lanes) as e:
                            weight = self.values[entry, v * lanes + e]
                            store(total, total[at + e] + self.x[source, self.input_of(entry)] * weight, at + e)
        for at in range(0, rows * columns, lanes):
            for u in range(1, apart):
                with T.vectorized(lanes) as e:
                    store(total, total[at + e] + total[u * rows * columns + at + e], at + e)
        for row in range(rows):
            with T.If(first + row < m), T.Then():
                self._store(total, row, first + row, p * columns, n, columns, lanes)

    def _store(self, total: Any, row: int, to: Any, start: Any, n: int, columns: int, lanes: int) -> None:
        if n % columns == 0:
            for v in range(VECTORS):
                with T.vectorized(lanes) as e:
                    value = total[row * columns + v * lanes + e]
                    store(self.out, self.finish(value, to, start + v * lanes + e), to, start + v * lanes + e)
        else:
            with T.serial(columns) as c, T.If(start + c < n), T.Then():
                store(self.out, self.finish(total[row * columns + c], to, start + c), to, start + c)
