"""Sequences and optionals of ONNX, as far as their lengths are constants: Python lists, and None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, Tensors, rule
from thresher.frontend.onnx.values import Unsupported, Value, combined, constant


@rule("Identity")
def identity(x: Value) -> Value:
    """Return x."""
    return x


@rule("SequenceConstruct")
def sequence_construct(*items: Value) -> Value:
    """Return the inputs as a sequence."""
    return _sequence(items)


@rule("SequenceEmpty")
def sequence_empty(*, dtype: int | None = None) -> Value:
    """Return a sequence of no tensors; of which type they would be has no meaning here."""
    return _sequence([])


@rule("SequenceLength")
def sequence_length(items: Value) -> Value:
    """Return the number of tensors."""
    return constant(len(_items(items)))


@rule("SequenceAt")
def sequence_at(items: Value, position: Ints) -> Value:
    """Return the tensor at a position, a negative one from the back."""
    return _items(items)[position[0]]


@rule("SequenceInsert")
def sequence_insert(items: Value, item: Value, position: Ints | None = None) -> Value:
    """Return the sequence with a tensor before a position, without one at the end."""
    tensors = list(_items(items))
    tensors.insert(len(tensors) if position is None else position[0], item)
    return _sequence(tensors)


@rule("SequenceErase")
def sequence_erase(items: Value, position: Ints | None = None) -> Value:
    """Return the sequence without the tensor at a position, the last one without one."""
    tensors = list(_items(items))
    del tensors[-1 if position is None else position[0]]
    return _sequence(tensors)


@rule("ConcatFromSequence", unsigned="native")
def concat_from_sequence(items: Tensors, *, axis: int, new_axis: int) -> Tensor:
    """Return the tensors of a sequence side by side, or stacked in a new dimension."""
    return torch.stack(items, axis) if new_axis else torch.cat(items, axis)


@rule("SplitToSequence")
def split_to_sequence(x: Value, split: Value | None = None, *, axis: int, keepdims: int) -> Value:
    """Return x in parts along an axis: of one size, of the sizes stated, or of size 1, then without the axis where ``keepdims`` is 0."""
    length = int(x.data.shape[axis])
    sizes = [1] * length if split is None else split.numbers("split")
    if not isinstance(sizes, list):
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    squeezed = split is None and not keepdims
    parts, start = [], 0
    for size in sizes:
        parts.append(combined(_part(axis, start, size, squeezed), x))
        start += size
    return _sequence(parts)


@rule("Optional")
def optional(x: Value | None = None, *, type: Any = None) -> Value:
    """Return x, or an empty optional."""
    return Value(None, constant=True) if x is None else x


@rule("OptionalHasElement")
def optional_has_element(x: Value | None = None) -> Value:
    """Return the answer whether there is a value."""
    return constant(x is not None and x.data is not None, torch.bool)


@rule("OptionalGetElement")
def optional_get_element(x: Value) -> Value:
    """Return the value of an optional that is not empty."""
    if x.data is None:
        raise Unsupported("the optional is empty")
    return x


def _items(value: Value) -> list[Value]:
    if not isinstance(value.data, list):
        raise Unsupported("its input is no sequence")
    return value.data


def _sequence(items: Sequence[Value]) -> Value:
    sources: frozenset[str] = frozenset().union(*(v.sources for v in items))
    return Value(list(items), constant=all(v.constant for v in items), sources=sources)


def _part(axis: int, start: int, size: int, squeezed: bool) -> Any:
    return lambda x: x.select(axis, start) if squeezed else x.narrow(axis, start, size)
