"""Scans of rows and searches in sorted rows, as loops: rows are computed in parallel, a row in its order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm.tirx.script.builder as T
from tvm import te, tirx

from thresher.backends.tvm.kernels.building import argument, buffer, function, i64, store, unflattened

EXTREMA = ("cummax", "cummin")


def dtypes(operation: str, dtype: str) -> list[str]:
    """Return the dtypes of the results of a scan: values, and of extrema their indices."""
    return [dtype, "int64"] if operation in EXTREMA else [dtype]


def scan(operation: str, shape: Sequence[int], dtype: str) -> tirx.PrimFunc:
    """Return the function (x [.., n], out [.., n], and for an extremum indices [.., n]).

    ``operation``: ``cummax``, ``cummin`` or ``logcumsumexp``, along the last dimension.
    """
    rows, size = math.prod(shape[:-1]), shape[-1]
    with function() as builder:
        x = argument("x", shape, dtype)
        outputs = [argument(f"out{i}", shape, d) for i, d in enumerate(dtypes(operation, dtype))]
        # of a kernel with one argument TVM asks whether it is a reshape, and expects a block
        with T.sblock("root"), T.parallel(rows) as row:
            state = [buffer(1, dtype), buffer(1, "int64" if operation in EXTREMA else dtype)]
            start = x[_index(shape, row, i64(0))] if operation in EXTREMA else tirx.const(float("-inf"), dtype)
            store(state[0], start, i64(0))
            store(state[1], i64(0) if operation in EXTREMA else tirx.const(0.0, dtype), i64(0))
            with T.serial(size) as i:
                element, at = x[_index(shape, row, i)], _index(shape, row, i)
                if operation in EXTREMA:
                    _take_extremum(operation, state, element, i)
                    store(outputs[0], state[0][i64(0)], *at)
                    store(outputs[1], state[1][i64(0)], *at)
                else:
                    _add_exponential(state, element)
                    store(outputs[0], state[0][i64(0)] + te.log(state[1][i64(0)]), *at)
    return builder.get()


def _take_extremum(operation: str, state: Sequence[Any], element: Any, i: Any) -> None:
    """Keep ``element`` and its index where it is not on the other side of what is kept; a NaN stays."""
    kept = state[0][i64(0)]
    better = element >= kept if operation == "cummax" else element <= kept
    if "float" in str(element.ty.dtype):
        better = tirx.any(tirx.isnan(element), tirx.all(tirx.Not(tirx.isnan(kept)), better))
    taken = buffer(1, "bool")
    store(taken, better, i64(0))
    store(state[0], tirx.Select(taken[i64(0)], element, state[0][i64(0)]), i64(0))
    store(state[1], tirx.Select(taken[i64(0)], T.cast(i, "int64"), state[1][i64(0)]), i64(0))


def _add_exponential(state: Sequence[Any], element: Any) -> None:
    """Keep the maximum m and the sum of exp(x - m)."""
    dtype = str(element.ty.dtype)
    maximum, total = buffer(1, dtype), buffer(1, dtype)
    store(maximum, tirx.max(state[0][i64(0)], element), i64(0))
    infinite = te.abs(maximum[i64(0)]) == tirx.const(float("inf"), dtype)
    base = tirx.Select(infinite, tirx.const(0.0, dtype), maximum[i64(0)])
    store(total, state[1][i64(0)] * te.exp(state[0][i64(0)] - base) + te.exp(element - base), i64(0))
    store(state[0], maximum[i64(0)], i64(0))
    store(state[1], total[i64(0)], i64(0))


def search(rows: Sequence[int], values: Sequence[int], dtype: str, index_dtype: str, right: bool) -> tirx.PrimFunc:
    """Return the function (rows [.., n] or [n], values [.., m], out [.., m]): the number of elements below each value.

    ``right``: also those that equal it.
    """
    size, count = rows[-1], math.prod(values)
    per_row = values[-1] if len(rows) > 1 else count
    with function() as builder:
        table, wanted = argument("rows", rows, dtype), argument("values", values, dtype)
        out = argument("out", values, index_dtype)
        with T.parallel(count) as flat:
            at = unflattened(values, flat)
            low = buffer(1, "int64")
            store(low, i64(0), i64(0))
            for step in (1 << s for s in reversed(range(size.bit_length()))):
                probe = tirx.min(low[i64(0)] + (step - 1), i64(size - 1))
                element = table[_index(rows, tirx.floordiv(flat, per_row), probe)]
                below = element <= wanted[at] if right else element < wanted[at]
                fits = low[i64(0)] + step <= size
                store(low, tirx.Select(tirx.all(fits, below), low[i64(0)] + step, low[i64(0)]), i64(0))
            store(out, T.cast(low[i64(0)], index_dtype), *at)
    return builder.get()


def _index(shape: Sequence[int], row: Any, last: Any) -> tuple[Any, ...]:
    """Return the index of element ``last`` of the row with number ``row``."""
    return (*unflattened(shape[:-1], row), last)
