"""Proofs that two index maps are the same, by z3: for every index, not for the ones a test happens to draw.

A movement (reshape, permute, slice, a regrouping of channels or heads) says of each element of its result where in its argument it comes
from. A rewrite of movements is right if the map before and the map after are the same function. For given sizes that is linear integer
arithmetic with division by constants, which z3 decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: From the sizes and the indices of an element of the result to the place it is read from; one integer or several.
IndexMap = Callable[..., Any]


class IndexMapError(AssertionError):
    """Raised where two maps differ; the message has sizes and an index where they do."""


def prove_same_map(
    left: IndexMap,
    right: IndexMap,
    sizes: Mapping[str, Sequence[int]],
    shape: Callable[..., Sequence[int]],
    where: Callable[..., bool] = lambda **sizes: True,
) -> int:
    """Prove ``left(*index, **sizes) == right(*index, **sizes)`` for every index within ``shape(**sizes)``.

    ``sizes`` lists the values of each size; all combinations for which ``where`` holds are proven. Maps may use + - * // %
    on what they are given. Returns the number of proofs; raises :class:`IndexMapError` with a counterexample.

    Example: reading channel c of a grouped layer, by group and index within it, is reading channel c::

        prove_same_map(
            lambda c, groups, width: c,
            lambda c, groups, width: (c // width) * width + c % width,
            sizes={"groups": (1, 2, 4), "width": (1, 3, 8)},
            shape=lambda groups, width: (groups * width,),
        )
    """
    import z3

    proven = 0
    for values in itertools.product(*sizes.values()):
        chosen = dict(zip(sizes, values))
        if not where(**chosen):
            continue
        extents = list(shape(**chosen))
        index = [z3.Int(f"i{d}") for d in range(len(extents))]
        solver = z3.Solver()
        solver.add([z3.And(i >= 0, i < extent) for i, extent in zip(index, extents)])
        one, other = (_tuple(f(*_divisible(index), **chosen)) for f in (left, right))
        if len(one) != len(other):
            raise IndexMapError(f"the maps give {len(one)} and {len(other)} indices")
        solver.add(z3.Or([_term(a) != _term(b) for a, b in zip(one, other)]))
        verdict = solver.check()
        if verdict == z3.sat:
            model = solver.model()
            element = [model.eval(i, model_completion=True).as_long() for i in index]
            reads = [[_term(v) if isinstance(v, int) else model.eval(_term(v)) for v in side] for side in (one, other)]
            raise IndexMapError(f"with {chosen} the element at {element} is read from {reads[0]} and from {reads[1]}")
        if verdict != z3.unsat:
            raise IndexMapError(
                f"z3 cannot decide whether the maps are the same with {chosen}: {solver.reason_unknown()}"
            )
        proven += 1
    if not proven:
        raise IndexMapError("no combination of sizes was asked for")
    return proven


class _Index:
    """A z3 integer whose // and % are Python's, for positive divisors."""

    def __init__(self, term: Any):
        self.term = term

    def __add__(self, other: Any) -> _Index:
        return _Index(self.term + _term(other))

    def __sub__(self, other: Any) -> _Index:
        return _Index(self.term - _term(other))

    def __rsub__(self, other: Any) -> _Index:
        return _Index(_term(other) - self.term)

    def __mul__(self, other: Any) -> _Index:
        return _Index(self.term * _term(other))

    def __floordiv__(self, other: Any) -> _Index:
        return _Index(self.term / _term(other))  # z3's division of integers rounds down for positive divisors

    def __mod__(self, other: Any) -> _Index:
        return _Index(self.term % _term(other))

    __radd__, __rmul__ = __add__, __mul__


def _divisible(index: Sequence[Any]) -> list[_Index]:
    return [_Index(i) for i in index]


def _term(value: Any) -> Any:
    return value.term if isinstance(value, _Index) else value


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
