"""The k-th largest of every row by a radix selection: floats are in the order of their bits, and each bit of the answer takes one count.

for each bit from the top:  is it set?  Yes, if at least k elements have all bits so far and this one, or more
"""

from __future__ import annotations

from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.kernels.building import argument, buffer, function, i32, i64, store

LOWEST = -(1 << 31)


def kernel(rows: int, size: int, lanes: int) -> tirx.PrimFunc:
    """Return the function (x [rows, size], k int32 [1], out [rows])."""
    whole = -(-size // lanes) * lanes
    with function() as builder:
        x, k, out = argument("x", (rows, size)), argument("k", (1,), "int32"), argument("out", (rows,))
        with T.parallel(rows) as row:
            keys, answer, counts = buffer(whole, "int32"), buffer(1, "int32"), buffer(lanes, "int32")
            with T.serial(size) as i:
                store(keys, ordered(tirx.reinterpret("int32", x[row, i])), i)
            with T.serial(whole - size) as i:
                store(keys, i32(LOWEST), size + i)
            store(answer, i32(LOWEST), i64(0))
            with T.serial(32) as step:
                # the first step is from the lowest number to 0; later ones set the bit 31 - step
                bit = T.shift_left(i32(1), tirx.max(i32(31) - T.cast(step, "int32"), i32(0)))
                trial = tirx.Select(step == 0, i32(0), answer[i64(0)] + bit)
                with T.vectorized(lanes) as e:
                    store(counts, i32(0), e)
                with T.serial(whole // lanes) as v, T.vectorized(lanes) as e:
                    store(counts, counts[e] + tirx.Select(keys[v * lanes + e] >= trial, i32(1), i32(0)), e)
                total = buffer(1, "int32")
                store(total, i32(0), i64(0))
                with T.serial(lanes) as e:
                    store(total, total[i64(0)] + counts[e], i64(0))
                store(answer, tirx.Select(total[i64(0)] >= k[0], trial, answer[i64(0)]), i64(0))
            store(out, tirx.reinterpret("float32", ordered(answer[i64(0)])), row)
    return builder.get()


def ordered(bits: Any) -> Any:
    """Return the bits of a float as an integer that is ordered like it, and back."""
    return tirx.Select(bits < i32(0), T.bitwise_xor(bits, i32(0x7FFFFFFF)), bits)
