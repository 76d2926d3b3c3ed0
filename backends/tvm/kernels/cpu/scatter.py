"""Writes at indices that are known only when the model runs, one after the other: each costs one read and one write.

    for q in the order of the values:  out[p(q)] = join(out[p(q)], values[q])        p(q) is q, with index[q] along one dimension

Of writes to one element the last stays, and sums are added in their order, as in torch. What the index does not touch, the dimensions
before and after it, is computed in parallel. An index outside of ``x`` writes nothing, a negative one counts from the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.tirx.script.builder as T
from tvm import tirx

from thresher.backends.tvm.kernels.building import argument, function, i32, i64, store, unflattened

#: How the element that is there and a value are joined; None: the value replaces it.
Join = Callable[[Any, Any], Any] | None


@dataclass(frozen=True)
class Scatter:
    """The shapes of a scatter along ``dim``: ``x`` and the result, and the values, which have as many dimensions and may be smaller.

    ``shared``: the index is [n], the same one for all other dimensions; else it has the shape of the values. ``fresh``: an element that is
    written starts from this instead of what it was. ``mean``: it is divided by the number of its values, and itself unless ``fresh``.
    """

    shape: Sequence[Any]
    values: Sequence[Any]
    dim: int
    shared: bool
    join: Join
    fresh: Any = None
    mean: bool = False

    def kernel(self, dtype: str, index_dtype: str, variables: Sequence[tirx.Var] = ()) -> tirx.PrimFunc:
        """Return the function (x, index, values, *variables, out), and for a mean (.., counts), which is scratch of the shape of ``x``.

        ``variables``: the free sizes, which the shapes are expressions of.
        """
        with function() as builder:
            x = argument("x", self.shape, dtype)
            index = argument("index", [self.values[self.dim]] if self.shared else self.values, index_dtype)
            values = argument("values", self.values, dtype)
            for variable in variables:
                T.arg(variable.name, variable)
            out = argument("out", self.shape, dtype)
            counts = argument("counts", self.shape, "int32") if self.mean else None
            with T.sblock("root"):
                self._copy(x, out, counts)
                if self.fresh is not None:
                    self._each(index, lambda p, q: store(out, self.fresh, *p))
                self._each(index, lambda p, q: self._write(out, counts, p, values[q]))
                if self.mean:
                    self._divide(out, counts, dtype)
        return builder.get()

    def _copy(self, x: Any, out: Any, counts: Any) -> None:
        with (
            T.parallel(math.prod(self.shape[: self.dim + 1])) as row,
            T.serial(math.prod(self.shape[self.dim + 1 :])) as i,
        ):
            p = (*unflattened(self.shape[: self.dim + 1], row), *unflattened(self.shape[self.dim + 1 :], i))
            store(out, x[p], *p)
            if counts is not None:
                store(counts, i32(0 if self.fresh is not None else 1), *p)

    def _each(self, index: Any, write: Callable[[tuple[Any, ...], tuple[Any, ...]], None]) -> None:
        """Do ``write(p, q)`` for all values q, in parallel over what lies before the dimension, or else after it."""
        before, after = self.values[: self.dim], self.values[self.dim + 1 :]
        size, columns = self.shape[self.dim], math.prod(after)
        alone = isinstance(columns, int) and math.prod(before) == 1
        parts = next(n for n in (8, 4, 2, 1) if columns % (16 * n) == 0 or n == 1) if alone else 1
        with (
            T.parallel(math.prod(before) * parts) as task,
            T.serial(self.values[self.dim]) as j,
            T.serial(columns // parts) as i,
        ):
            lead = unflattened(before, task // parts)
            rest = unflattened(after, task % parts * (columns // parts) + i)
            q = (*lead, j, *rest)
            at = T.cast(index[j] if self.shared else index[q], "int64")
            at = tirx.Select(at < i64(0), at + i64(size), at)
            with T.If(tirx.all(at >= i64(0), at < i64(size))), T.Then():
                write((*lead, at, *rest), q)

    def _write(self, out: Any, counts: Any, p: tuple[Any, ...], value: Any) -> None:
        store(out, value if self.join is None else self.join(out[p], value), *p)
        if counts is not None:
            store(counts, counts[p] + i32(1), *p)

    def _divide(self, out: Any, counts: Any, dtype: str) -> None:
        with T.parallel(math.prod(self.shape)) as flat:
            p = unflattened(self.shape, flat)
            members = T.cast(tirx.max(counts[p], i32(1)), dtype)
            store(out, out[p] / members if "float" in dtype else tirx.floordiv(out[p], members), *p)
