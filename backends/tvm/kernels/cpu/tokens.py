"""Assigning tokens to fewer slots (``thresher.ops.tokens``): small loops over tokens, ranks by counting, channels in registers."""

from __future__ import annotations

from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.kernels.building import argument, buffer, f32, function, i64, store, vectors
from thresher.ops.tokens import FIRST, GOES, NEVER, TAKES


def rank(values: Any, base: Any, i: Any, size: int) -> Any:
    """Return the rank of values[base + i] among ``size`` in falling order; a scalar that is read once."""
    count = buffer(1, "int64")
    store(count, i64(0), i64(0))
    with T.serial(size) as j:
        mine, its = values[base + i], values[base + j]
        ahead = tirx.any(its > mine, tirx.all(its == mine, j < i))
        store(count, count[i64(0)] + T.cast(ahead, "int64"), i64(0))
    return count[i64(0)]


def match(batch: int, tokens: int, count: int, drop: bool) -> tirx.PrimFunc:
    """Return the function (similar [B, N, N], size [B, N], side int64 [B, N], assign int64 [B, N], sizes [B, N - count], own [B, N])."""
    n = tokens
    with function() as builder:
        similar, size = argument("similar", (batch, n, n)), argument("size", (batch, n))
        side, assign = (argument(name, (batch, n), "int64") for name in ("side", "assign"))
        sizes, keeps = argument("sizes", (batch, n - count)), argument("own", (batch, n))
        worth, partner = buffer(batch * n), buffer(batch * n, "int64")
        going, slot = buffer(batch * n, "int64"), buffer(batch * n, "int64")
        with T.parallel(batch * n) as at:
            b, i = at // n, at % n
            best = buffer(1)
            store(best, f32(NEVER), i64(0))
            store(partner, i64(0), at)
            with T.If(side[b, i] == GOES), T.Then(), T.serial(n) as j:
                better = tirx.all(side[b, j] == TAKES, similar[b, i, j] > best[i64(0)])
                with T.If(better), T.Then():
                    store(best, similar[b, i, j], i64(0))
                    store(partner, j, at)
            there = tirx.Select(size[b, i] > f32(0.0), best[i64(0)], f32(FIRST))
            store(worth, tirx.Select(side[b, i] == GOES, there, f32(NEVER)), at)
        with T.parallel(batch * n) as at:
            store(going, T.cast(rank(worth, at // n * n, at % n, n) < count, "int64"), at)
        with T.parallel(batch) as b:
            next_slot = buffer(1, "int64")
            store(next_slot, i64(0), i64(0))
            with T.serial(n - count) as j:
                store(sizes, f32(0.0), b, j)
            with T.serial(n) as i:
                store(slot, next_slot[i64(0)], b * n + i)
                store(next_slot, next_slot[i64(0)] + 1 - going[b * n + i], i64(0))
            with T.serial(n) as i:
                at = b * n + i
                taken = i64(-1) if drop else slot[b * n + partner[at]]
                store(assign, tirx.Select(going[at] == 1, taken, slot[at]), b, i)
                store(keeps, T.cast(going[at] == 0, "float32"), b, i)
                with T.If(assign[b, i] >= 0), T.Then():
                    store(sizes, sizes[b, assign[b, i]] + size[b, i], b, assign[b, i])
    return builder.get()


def reduce(batch: int, tokens: int, channels: int, count: int, lanes: int) -> tirx.PrimFunc:
    """Return the function (x [B, N, C], size [B, N], assign int64 [B, N], result [B, count, C])."""
    with function() as builder:
        x, size = argument("x", (batch, tokens, channels)), argument("size", (batch, tokens))
        assign = argument("assign", (batch, tokens), "int64")
        result = argument("result", (batch, count, channels))
        with T.parallel(batch) as b:
            total, members = buffer(count), buffer(count)
            with T.serial(count) as j:
                store(total, f32(0.0), j)
                store(members, f32(0.0), j)
                with vectors(channels, lanes) as c:
                    store(result, f32(0.0), b, j, c)
            with T.serial(tokens) as i, T.If(assign[b, i] >= 0), T.Then():
                store(total, total[assign[b, i]] + size[b, i], assign[b, i])
                store(members, members[assign[b, i]] + f32(1.0), assign[b, i])
            with T.serial(tokens) as i, T.If(assign[b, i] >= 0), T.Then():
                j = assign[b, i]
                share = tirx.Select(total[j] > f32(0.0), size[b, i] / total[j], f32(1.0) / members[j])
                with vectors(channels, lanes) as c:
                    store(result, result[b, j, c] + share * x[b, i, c], b, j, c)
    return builder.get()
