"""The requirements on one argument of a compiled model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.errors import InputError

#: Sizes of the symbols seen so far in a call, each with the place of its first occurrence.
Symbols = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor input. A dimension is a number, or the name of a symbol that may take any size (the same wherever it occurs)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def check(self, value: Any, device: str, symbols: Symbols) -> None:
        """Raise :class:`InputError` unless ``value`` is a tensor of this dtype and shape; a torch tensor must be on ``device``."""
        if not is_tensor(value):
            raise InputError(f"argument {self.name!r} must be a tensor or a NumPy array, not {type(value).__name__}")
        dtype = dtype_name(value.dtype)
        if dtype != self.dtype:
            raise InputError(
                f"argument {self.name!r} has dtype {dtype}, but the model was compiled for {self.dtype}; convert it first"
            )
        if not isinstance(value, np.ndarray) and value.device.type != device:
            raise InputError(
                f"argument {self.name!r} is on {value.device}, but the model was compiled for {device}; "
                f"move it with .to({device!r})"
            )
        if tuple(value.shape) != self.shape:
            self._check_shape(tuple(map(int, value.shape)), symbols)

    def _check_shape(self, shape: tuple[int, ...], symbols: Symbols) -> None:
        compiled = "(" + ", ".join(map(str, self.shape)) + ")"
        message = f"argument {self.name!r} has shape {shape}, but the model was compiled for {compiled}"
        if len(shape) != len(self.shape):
            raise InputError(message)
        for dim, (size, expected) in enumerate(zip(shape, self.shape)):
            if isinstance(expected, str):
                first, where = symbols.setdefault(expected, (size, f"{self.name}[{dim}]"))
                if size != first:
                    raise InputError(
                        f"dimension {dim} of argument {self.name!r} is {size}, but {where}, which must be the same, is {first}"
                    )
            elif size != expected:
                raise InputError(
                    f"{message}; compile again with such an example, or free the dimension with dynamic_shapes"
                )


@dataclass(frozen=True)
class LiteralSpec:
    """An input or output that is not a tensor: fixed when the model was captured."""

    name: str
    value: Any

    def check(self, value: Any) -> None:
        """Raise :class:`InputError` unless ``value`` equals the captured one; NaN equals NaN."""
        if is_tensor(value) or not (value == self.value or (value != value and self.value != self.value)):
            raise InputError(
                f"argument {self.name!r} was {self.value!r} when the model was captured and cannot change to {value!r}"
            )


@dataclass(frozen=True)
class NumberSpec:
    """An output that is a number which the inputs decide: a size, or what ``item()`` reads. ``kind``: ``int``, ``float`` or ``bool``."""

    kind: str

    def read(self, tensor: Any) -> int | float | bool:
        """Return the number in a tensor of one element."""
        return {"int": int, "float": float, "bool": bool}[self.kind](tensor)


def is_tensor(value: Any) -> bool:
    """Return True for NumPy arrays and torch tensors; the latter are known by their methods, because torch may not be installed."""
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Return the name of a torch or NumPy dtype: ``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")
