"""What one argument of a compiled model must be. Used where torch is, and where it is not."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from thresher.errors import InputError


@dataclass(frozen=True)
class TensorSpec:
    """One tensor input. A dimension is a number, or the name of a symbol that may take any size (the same wherever it occurs)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class LiteralSpec:
    """An input or output that is not a tensor: fixed when the model was captured."""

    name: str
    value: Any


@functools.cache
def dtype_name(dtype: Any) -> str:
    """``torch.float32`` or NumPy's -> ``float32``."""
    return str(dtype).removeprefix("torch.")


def check_shape(spec: TensorSpec, value: Any, symbols: dict[str, tuple[int, str]]) -> None:
    if tuple(value.shape) == spec.shape:
        return
    shown = "(" + ", ".join(map(str, spec.shape)) + ")"
    advice = "compile again with such an example, or free the dimension with dynamic_shapes"
    if len(value.shape) != len(spec.shape):
        raise InputError(
            f"argument {spec.name!r} has shape {tuple(value.shape)}, but the model was compiled for {shown}"
        )
    for place, (have, want) in enumerate(zip(value.shape, spec.shape)):
        if isinstance(want, str):
            first, where = symbols.setdefault(want, (int(have), f"{spec.name}[{place}]"))
            if have != first:
                raise InputError(
                    f"dimension {place} of argument {spec.name!r} is {have}, but {where}, which must be the same, is {first}"
                )
        elif have != want:
            raise InputError(
                f"argument {spec.name!r} has shape {tuple(value.shape)}, but the model was compiled for {shown}; {advice}"
            )
