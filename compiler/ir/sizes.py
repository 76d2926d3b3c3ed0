"""Free sizes as expressions: the symbols in them, and what they are for other sizes than those of the example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
Numbers = Mapping[sympy.Symbol, int]
SMALL = 16  # sizes that may be multiplied without making a run slow, as an image would
#: Other sizes than that of the example, for the i-th symbol. What keeps the remainder of a division comes first, then multiples, because a
#: size may have to be one.
OTHERS: tuple[Callable[[int, int], int], ...] = (
    *(lambda i, size, k=k: (i + 2) * size if size < SMALL else size + (i + 1) * k for k in (16, 32)),
    *(lambda i, size, k=k: (i + k) * size for k in (2, 3, 5, 8)),
    *(lambda i, size, k=k: size + (i + 1) * k for k in (64, 32, 16, 8, 4, 2, 1)),
    lambda i, size: size // (i + 2),
    lambda i, size: size - i - 1,
)  # fmt: skip


def symbols_of(values: Iterable[Any]) -> list[tuple[Any, sympy.Symbol]]:
    """Return the symbols in the sizes among ``values``, and in shapes and strides of tensors, each with its environment, by name."""
    symbols: dict[sympy.Symbol, Any] = {}
    for value in values:
        for size in (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,):
            if isinstance(size, SIZES):
                symbols |= dict.fromkeys(size.node.expr.free_symbols, size.node.shape_env)
    return [(symbols[s], s) for s in sorted(symbols, key=str)]


def number(size: Any, numbers: Numbers) -> Any:
    """Return a size for these numbers of its symbols; what is no free size as it is."""
    if not isinstance(size, SIZES):
        return size
    value = size.node.expr.xreplace({s: sympy.Integer(n) for s, n in numbers.items()})
    kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
    return kinds[type(size)](value)


def other_sizes(values: Iterable[Any], together: bool = False) -> Iterator[dict[sympy.Symbol, int]]:
    """Yield numbers for the symbols in ``values``, within their bounds and other than those of the example.

    No two are the same; ``together``: but those that are the same in the example. None where there are no symbols, or where data decide one
    of them.
    """
    symbols = symbols_of(values)
    if not symbols or not all(s in environment.backed_var_to_val for environment, s in symbols):
        return
    example = [int(e.backed_var_to_val[s]) for e, s in symbols]
    index = [example.index(size) if together else i for i, size in enumerate(example)]
    for other in OTHERS:
        numbers = {s: other(i, size) for i, size, (_, s) in zip(index, example, symbols)}
        bounds = (e.var_to_range[s] for e, s in symbols)
        different = together or len(set(numbers.values())) == len(numbers)
        if different and all(max(1, b.lower) <= n <= b.upper for b, n in zip(bounds, numbers.values())):
            yield numbers
