"""The values of an ONNX graph while a module runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Unsupported(Exception):
    """A use of an operator that is not covered; the message says which.

    ``inputs``: the inputs of the model that would have to be constants.
    """

    def __init__(self, message: str, inputs: frozenset[str] = frozenset()):
        super().__init__(message)
        self.inputs = inputs


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor, a sequence of values, or None (an optional that is empty).

    Attributes:
        data: the tensor, the list of values, or None.
        constant: it depends on no input, or on shapes only: ``data`` is a real tensor, also while torch.export traces fake ones.
        elem_type: the type as ONNX numbers it, where torch's type does not tell (4-bit integers are kept in 8 bits).
        parameter: the name of the parameter or buffer of the module that holds this constant.
        retrace: computes a constant of the module's parameters as they are now, which the user may have masked or replaced.
        sources: names of inputs of the model of which it is computed (for messages).
    """

    data: Any
    constant: bool = False
    elem_type: int | None = None
    parameter: str | None = None
    retrace: Callable[[], Tensor] | None = None
    sources: frozenset[str] = frozenset()

    def tensor(self) -> Tensor:
        """Return the tensor for a computation that is captured."""
        if not isinstance(self.data, Tensor):
            raise Unsupported("a sequence or an empty optional where a tensor belongs")
        return self.data if self.retrace is None else self.retrace()

    def known(self, name: str) -> Tensor:
        """Return the tensor of a constant; raise :class:`Unsupported` for another, calling it ``name``."""
        if not self.constant:
            raise Unsupported(f"values of {', '.join(sorted(self.sources))} decide its {name}", self.sources)
        if not isinstance(self.data, Tensor):
            raise Unsupported(f"its {name} is no tensor")
        with real_tensors():
            return self.data.detach()

    def numbers(self, name: str) -> Any:
        """Return the number of a constant, or the nested list of them, as :meth:`known` checks it."""
        with real_tensors():
            return self.known(name).tolist()


@contextmanager
def real_tensors() -> Iterator[None]:
    """Compute at once in the block, also while torch.export traces."""
    with _disable_current_modes():
        yield


def constant(data: Any, dtype: torch.dtype = torch.int64) -> Value:
    """Return numbers as a constant value."""
    with real_tensors():
        return Value(torch.tensor(data, dtype=dtype), constant=True)


def combined(function: Callable[..., Tensor], *values: Value) -> Value:
    """Return ``function`` of the tensors of values: a constant where all of them are."""
    sources = frozenset().union(*(v.sources for v in values))
    if not all(v.constant for v in values):
        return Value(function(*(v.tensor() for v in values)), sources=sources)
    with real_tensors():
        tensor = function(*(v.known("input") for v in values))
    again = (lambda: function(*(v.tensor() for v in values))) if any(v.retrace for v in values) else None
    return Value(tensor, constant=True, retrace=again)
