"""Maxima and minima as torch defines them: a NaN is larger and smaller than all, and of equal elements the first counts."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

LAST_INDEX = (1 << 63) - 1


def extremum(largest: bool) -> Any:
    """Return the reduction ``f(expression, axis=)`` to the largest (or smallest) element; a NaN among them is the result."""

    def combine(kept: Any, other: Any) -> Any:
        better = kept > other if largest else kept < other
        return tirx.Select(tirx.any(better, tirx.isnan(kept)) if _floating(kept.ty.dtype) else better, kept, other)

    return te.comm_reducer(combine, lambda dtype: limit(dtype, largest), name="extremum")


def first_extremum(largest: bool) -> Any:
    """Return the reduction ``f((index, expression), axis=)`` to the first largest (or smallest) element: its index and its value."""

    def combine(kept: Any, other: Any) -> Any:
        earlier, better = kept[0] < other[0], kept[1] > other[1] if largest else kept[1] < other[1]
        wins = tirx.any(better, tirx.all(kept[1] == other[1], earlier))
        if _floating(kept[1].ty.dtype):
            one, two = tirx.isnan(kept[1]), tirx.isnan(other[1])
            wins = tirx.any(tirx.all(one, tirx.any(tirx.Not(two), earlier)), tirx.all(tirx.Not(two), wins))
        return tirx.Select(wins, kept[0], other[0]), tirx.Select(wins, kept[1], other[1])

    def identity(index: Any, value: Any) -> Any:
        return tirx.const(LAST_INDEX, index), limit(value, largest)

    return te.comm_reducer(combine, identity, name="first_extremum")


def limit(dtype: Any, largest: bool) -> Any:
    """Return the value that every other is larger (or smaller) than, or equal to."""
    if _floating(dtype):
        return tirx.const(float("-inf") if largest else float("inf"), dtype)
    if str(dtype) == "bool":
        return tirx.const(not largest, "bool")
    return te.min_value(str(dtype)) if largest else te.max_value(str(dtype))


def _floating(dtype: Any) -> bool:
    return "float" in str(dtype)
