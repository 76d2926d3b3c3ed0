"""Linear layers that read only the part of the weight that meets an input other than 0.

A few rows (a token that is decoded): the weight is stored as [K, N], so that an input that is 0 saves a whole row of memory. The inputs
that are not 0 for any of the rows are listed first; then GROUP rows of the weight at a time are added, times their inputs, to sums that
stay in the L1 cache. Each thread has its own columns.

Many rows: tiles of rows, each with its own list, and the packed panels of a dense product; a step of the innermost loop takes the next
input on the list instead of the next one. A tile of which most inputs count takes them all; one whose rows have little in common
computes its rows one by one, each with a list of its own.

Gated: the other way round. Of the rows of the weight as it is, [N, K], those are multiplied whose gate is not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.cpu import CACHE_LINE, CpuInfo
from thresher.backends.tvm.kernels.building import argument, buffer, f32, function, i64, prefetch, store

MAX_FEW_ROWS = 8  # rows for which the weight is read once, and its columns are the threads'
GROUP = 32  # rows of the weight that are added at once, times rows of the input
MAX_SUMS = 2048  # that a thread adds to at a time: 8 KB
VECTORS = 2  # registers of a row of a tile
PREFETCH_DISTANCE = (
    12  # inputs on the list, whose part of the weight is fetched before it is needed: no hardware guesses it
)
SINGLE_ROW_COST = 2.5  # times as long takes an element that is not 0 where rows are taken apart
STEP = 4  # elements of a row that is taken apart, with sums of their own
WHOLE_LIST_FRACTION = 0.45  # of the inputs on its list, from which on a tile takes them all: memory is faster in order (measured on Zen 4)


@dataclass(frozen=True)
class Operand:
    """One more input of a kernel: its shape as it is stored, and its type."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Problem:
    """A product of x [m, k] with a weight of n columns; ``more``: the operands that ``finish`` reads."""

    m: int
    k: int
    n: int
    more: tuple[Operand, ...] = ()


def padded(n: int, machine: CpuInfo) -> int:
    """Return the columns of the weight as stored for a few rows."""
    return -(-n // machine.lanes) * machine.lanes


def few_rows(problem: Problem, machine: CpuInfo, finish: Callable[..., Any]) -> tirx.PrimFunc:
    """Return the function (x [m, k], weight [k, padded n], *more, out [m, n]); ``finish(value, row, column, *more)`` is what it stores."""
    m, k, n, lanes = problem.m, problem.k, problem.n, machine.lanes
    group, sums = min(16, GROUP // m), max(lanes, MAX_SUMS // m // lanes * lanes)
    wide = padded(n, machine)
    chunk = -(-wide // machine.threads // lanes) * lanes  # columns of a thread
    sums = min(sums, chunk)
    with function() as builder:
        x, weight = argument("x", (m, k)), argument("weight", (k, wide))
        more = [argument(f"more{i}", o.shape, o.dtype) for i, o in enumerate(problem.more)]
        out = argument("out", (m, n))
        with T.parallel(-(-wide // chunk)) as task:
            listed, count = buffer(k + 1, "int32"), buffer(1, "int64")
            _list(x, m, k, listed, count)
            total = buffer(m * sums)
            with T.serial(-(-chunk // sums)) as part:
                start = task * chunk + part * sums
                size = tirx.min(tirx.min(i64(sums), chunk - part * sums), wide - start)
                vectors = T.floordiv(tirx.max(size, i64(0)), lanes)
                with T.serial(m * sums // lanes) as v, T.vectorized(lanes) as e:
                    store(total, f32(0.0), v * lanes + e)
                whole = T.floordiv(count[i64(0)], group)
                with T.serial(whole) as g:
                    _add(total, x, weight, listed, g * group, group, m, sums, start, vectors, lanes)
                if group > 1:
                    with T.serial(count[i64(0)] - whole * group) as rest:
                        _add(total, x, weight, listed, whole * group + rest, 1, m, sums, start, vectors, lanes)
                _store_columns(out, total, more, finish, m, n, sums, start, vectors, lanes, wide)
    return builder.get()


def _list(x: Any, m: int, k: int, listed: Any, count: Any) -> None:
    """List the inputs that are not 0 in some row, without a branch: each is written, and the next one over it if it was 0."""
    store(count, i64(0), i64(0))
    with T.serial(k) as j:
        store(listed, T.cast(j, "int32"), count[i64(0)])
        store(count, count[i64(0)] + counts([x[row, j] for row in range(m)]), i64(0))


def counts(values: list[Any]) -> Any:
    """Return 1 if one of the values is not 0; a NaN is not, though ``!=`` says so."""
    zero = values[0] == f32(0.0)
    for value in values[1:]:
        zero = tirx.all(zero, value == f32(0.0))
    return tirx.Select(zero, i64(0), i64(1))


def _add(
    total: Any,
    x: Any,
    weight: Any,
    listed: Any,
    first: Any,
    group: int,
    m: int,
    sums: int,
    start: Any,
    vectors: Any,
    lanes: int,
) -> None:
    """Add ``group`` rows of the weight, times their inputs, to the sums."""
    inputs = [T.cast(listed[first + i], "int64") for i in range(group)]
    factors = buffer(m * group)
    for row in range(m):
        for i in range(group):
            store(factors, x[row, inputs[i]], i64(row * group + i))
    with T.serial(vectors) as v, T.unroll(m) as row, T.vectorized(lanes) as e:
        value = total[row * sums + v * lanes + e]
        for i in range(group):
            value = value + factors[row * group + i] * weight[inputs[i], start + v * lanes + e]
        store(total, value, row * sums + v * lanes + e)


def _store_columns(
    out: Any, total: Any, more: list[Any], finish: Callable[..., Any], m: int, n: int, sums: int, start: Any, vectors: Any, lanes: int,
    wide: int,
) -> None:  # fmt: skip
    with T.serial(m) as row:
        if wide == n:
            with T.serial(vectors) as v, T.vectorized(lanes) as e:
                column = start + v * lanes + e
                store(out, finish(total[row * sums + v * lanes + e], row, column, *more), row, column)
        else:
            with T.serial(vectors * lanes) as c, T.If(start + c < n), T.Then():
                store(out, finish(total[row * sums + c], row, start + c, *more), row, start + c)


# ---------------------------------------------------------------------- many rows


def tile_rows(m: int, machine: CpuInfo) -> int:
    """Return the rows of a tile: as many as the registers hold sums for, and tiles that are alike."""
    most = machine.accumulators // VECTORS
    return -(-m // -(-m // most))


def many_rows(problem: Problem, machine: CpuInfo, finish: Callable[..., Any]) -> tirx.PrimFunc:
    """Return the function (x [m, k], packed weight [panels, k, columns], *more, out [m, n])."""
    m, k, n, lanes = problem.m, problem.k, problem.n, machine.lanes
    rows, columns = tile_rows(m, machine), VECTORS * lanes
    tiles, panels = -(-m // rows), -(-n // columns)
    with function() as builder:
        x, weight = argument("x", (m, k)), argument("weight", (panels, k, columns))
        more = [argument(f"more{i}", o.shape, o.dtype) for i, o in enumerate(problem.more)]
        out = argument("out", (m, n))
        lists = _Lists(x, m, k, rows, tiles, lanes)
        with T.parallel(tiles) as t:
            lists.make(t)
        with T.parallel(panels) as panel, T.serial(tiles) as t, T.If(lists.apart[t] > 0):
            with T.Then(), T.serial(tirx.min(i64(rows), m - t * rows)) as row:
                total = buffer(STEP * columns)
                lists.row(total, weight, panel, t * rows + row, columns)
                _store_tile(out, total, more, finish, 0, t * rows + row, panel * columns, n, columns, lanes)
            with T.Else():
                total = buffer(rows * columns)
                lists.tile(total, weight, panel, t, columns)
                for row in range(rows):
                    with T.If(t * rows + row < m), T.Then():
                        _store_tile(out, total, more, finish, row, t * rows + row, panel * columns, n, columns, lanes)
    return builder.get()


class _Lists:
    """The lists of every tile of rows: inputs that count for some row and their values side by side; or, ``apart``, one for each row."""

    def __init__(self, x: Any, m: int, k: int, rows: int, tiles: int, lanes: int):
        self.x, self.m, self.k, self.rows, self.lanes = x, m, k, rows, lanes
        self.listed, self.count, self.apart = (
            buffer(tiles * k + 1, "int32"),
            buffer(tiles, "int64"),
            buffer(tiles, "int64"),
        )
        self.packed = buffer(tiles * k * rows)
        self.wide = -(-k // STEP) * STEP + STEP  # places of a row's own list
        self.own, self.values = buffer(m * self.wide, "int32"), buffer(m * self.wide)
        self.owns = buffer(m, "int64")

    def make(self, t: Any) -> None:
        k, rows, x = self.k, self.rows, self.x
        some, length, number = buffer(k), buffer(1, "int64"), buffer(1)
        source = [tirx.min(t * rows + row, self.m - 1) for row in range(rows)]
        self._look(source, some, number)
        store(length, i64(0), i64(0))
        with T.serial(k) as j:
            store(self.listed, T.cast(j, "int32"), t * k + length[i64(0)])
            store(length, length[i64(0)] + counts([some[j]]), i64(0))
        whole = T.cast(length[i64(0)], "float32") >= f32(WHOLE_LIST_FRACTION * k)
        together = tirx.Select(whole, f32(float(k * rows)), T.cast(length[i64(0)] * rows, "float32"))
        store(self.apart, T.cast(number[i64(0)] * f32(SINGLE_ROW_COST) < together, "int64"), t)
        with T.If(self.apart[t] > 0):
            with T.Then(), T.serial(tirx.min(i64(rows), self.m - t * rows)) as row:
                self._own(t * rows + row)
            with T.Else():
                with T.If(whole), T.Then():
                    with T.serial(k) as j:
                        store(self.listed, T.cast(j, "int32"), t * k + j)
                    store(length, i64(k), i64(0))
                store(self.count, length[i64(0)], t)
                with T.serial(length[i64(0)]) as i:
                    j = T.cast(self.listed[t * k + i], "int64")
                    for row in range(rows):
                        store(self.packed, x[source[row], j], (t * k + i) * rows + row)

    def _look(self, source: list[Any], some: Any, number: Any) -> None:
        """Store in ``some`` a number other than 0 where an input counts for some row, in ``number`` how many elements are not 0."""
        k, lanes, x = self.k, self.lanes, self.x
        parts = buffer(lanes)
        with T.vectorized(lanes) as e:
            store(parts, f32(0.0), e)

        def seen(at: Any) -> tuple[Any, Any]:
            elements = [x[s, at] for s in source]
            ones = [tirx.Select(v == f32(0.0), f32(0.0), f32(1.0)) for v in elements]
            return sum(map(tirx.abs, elements[1:]), tirx.abs(elements[0])), sum(ones[1:], ones[0])

        with T.serial(k // lanes) as v, T.vectorized(lanes) as e:
            size, ones = seen(v * lanes + e)
            store(some, size, v * lanes + e)
            store(parts, parts[e] + ones, e)
        store(number, f32(0.0), i64(0))
        with T.serial(lanes) as e:
            store(number, number[i64(0)] + parts[e], i64(0))
        with T.serial(k % lanes) as e:
            size, ones = seen(k // lanes * lanes + e)
            store(some, size, k // lanes * lanes + e)
            store(number, number[i64(0)] + ones, i64(0))

    def _own(self, row: Any) -> None:
        """Make the list of one row, filled up with zeros to whole steps."""
        length, base = buffer(1, "int64"), row * self.wide
        store(length, i64(0), i64(0))
        with T.serial(self.k) as j:
            store(self.own, T.cast(j, "int32"), base + length[i64(0)])
            store(self.values, self.x[row, j], base + length[i64(0)])
            store(length, length[i64(0)] + counts([self.x[row, j]]), i64(0))
        with T.serial(STEP) as i:
            store(self.own, tirx.const(0, "int32"), base + length[i64(0)] + i)
            store(self.values, f32(0.0), base + length[i64(0)] + i)
        store(self.owns, T.floordiv(length[i64(0)] + STEP - 1, STEP), row)

    def tile(self, total: Any, weight: Any, panel: Any, t: Any, columns: int) -> None:
        """Compute the sums of a tile, by its list."""
        k, rows, lanes = self.k, self.rows, self.lanes
        for v in range(rows * VECTORS):
            with T.vectorized(lanes) as e:
                store(total, f32(0.0), v * lanes + e)
        with T.serial(self.count[t]) as i:
            j, offset = T.cast(self.listed[t * k + i], "int64"), (t * k + i) * rows
            ahead = T.cast(self.listed[t * k + tirx.min(i + PREFETCH_DISTANCE, k - 1)], "int64")
            for line in range(0, columns, CACHE_LINE // 4):
                prefetch(weight, panel, ahead, i64(line))
            for row in range(rows):
                for v in range(VECTORS):
                    with T.vectorized(lanes) as e:
                        at = (row * VECTORS + v) * lanes + e
                        store(total, total[at] + self.packed[offset + row] * weight[panel, j, v * lanes + e], at)

    def row(self, total: Any, weight: Any, panel: Any, row: Any, columns: int) -> None:
        """Compute the sums of one row, by its own list; the first ``columns`` of ``total``."""
        lanes = self.lanes
        for v in range(STEP * VECTORS):
            with T.vectorized(lanes) as e:
                store(total, f32(0.0), v * lanes + e)
        with T.serial(self.owns[row]) as i:
            for u in range(STEP):
                at = row * self.wide + i * STEP + u
                j = T.cast(self.own[at], "int64")
                for v in range(VECTORS):
                    with T.vectorized(lanes) as e:
                        to = (u * VECTORS + v) * lanes + e
                        store(total, total[to] + self.values[at] * weight[panel, j, v * lanes + e], to)
        for v in range(VECTORS):
            with T.vectorized(lanes) as e:
                parts = [total[(u * VECTORS + v) * lanes + e] for u in range(STEP)]
                store(total, (parts[0] + parts[1]) + (parts[2] + parts[3]), v * lanes + e)


def _store_tile(
    out: Any,
    total: Any,
    more: list[Any],
    finish: Callable[..., Any],
    row: int,
    to: Any,
    start: Any,
    n: int,
    columns: int,
    lanes: int,
) -> None:
    if n % columns == 0:
        for v in range(columns // lanes):
            with T.vectorized(lanes) as e:
                at = start + v * lanes + e
                store(out, finish(total[(row * columns) + v * lanes + e], to, at, *more), to, at)
    else:
        with T.serial(columns) as c, T.If(start + c < n), T.Then():
            store(out, finish(total[row * columns + c], to, start + c, *more), to, start + c)


# ---------------------------------------------------------------------- gated


def gated(problem: Problem, machine: CpuInfo, has_bias: bool) -> tirx.PrimFunc:
    """Return the function (x [m, k], weight [n, k], [bias [n],] gate [m, n], out [m, n]); k is a multiple of the lanes."""
    m, k, n, lanes = problem.m, problem.k, problem.n, machine.lanes
    group = max(1, 4 // m)
    chunk = -(-n // machine.threads)
    with function() as builder:
        x, weight = argument("x", (m, k)), argument("weight", (n, k))
        bias = argument("bias", (n,)) if has_bias else None
        gate, out = argument("gate", (m, n)), argument("out", (m, n))
        with T.parallel(machine.threads) as task:
            start = task * chunk
            size = tirx.max(i64(0), tirx.min(i64(chunk), n - start))
            listed, count = buffer(chunk + 1, "int32"), buffer(1, "int64")
            store(count, i64(0), i64(0))
            with T.serial(size) as c:
                store(listed, T.cast(start + c, "int32"), count[i64(0)])
                for row in range(m):
                    store(out, f32(0.0), row, start + c)
                store(count, count[i64(0)] + counts([gate[row, start + c] for row in range(m)]), i64(0))
            whole = T.floordiv(count[i64(0)], group)
            with T.serial(whole) as g:
                _dots(x, weight, bias, gate, out, listed, g * group, group, m, k, lanes)
            if group > 1:
                with T.serial(count[i64(0)] - whole * group) as rest:
                    _dots(x, weight, bias, gate, out, listed, whole * group + rest, 1, m, k, lanes)
    return builder.get()


def _dots(
    x: Any, weight: Any, bias: Any, gate: Any, out: Any, listed: Any, first: Any, group: int, m: int, k: int, lanes: int
) -> None:
    """Compute ``group`` rows of the weight times all rows of x."""
    columns = [T.cast(listed[first + i], "int64") for i in range(group)]
    total = buffer(group * m * lanes)
    for v in range(group * m):
        with T.vectorized(lanes) as e:
            store(total, f32(0.0), v * lanes + e)
    with T.serial(k // lanes) as v:
        for i in range(group):
            for row in range(m):
                with T.vectorized(lanes) as e:
                    at = (i * m + row) * lanes + e
                    store(total, total[at] + weight[columns[i], v * lanes + e] * x[row, v * lanes + e], at)
    for i in range(group):
        for row in range(m):
            value = buffer(1)
            store(value, f32(0.0) if bias is None else bias[columns[i]], i64(0))
            with T.unroll(lanes) as e:
                store(value, value[i64(0)] + total[(i * m + row) * lanes + e], i64(0))
            factor = gate[row, columns[i]]
            store(out, tirx.Select(factor == f32(0.0), f32(0.0), factor * value[i64(0)]), row, columns[i])
