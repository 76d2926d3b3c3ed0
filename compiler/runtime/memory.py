"""The memory of torch tensors and NumPy arrays: its bytes, and what of it is shared. Torch tensors are known by their methods."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

MAX_WORK = 100_000  # steps of the search for a common element; where it ends earlier, there may be one


class _Interface:
    """A part of memory in the protocol by which NumPy reads the memory of others; it keeps the tensor alive."""

    def __init__(self, tensor: Any, **layout: Any):
        self.tensor = tensor
        self.__array_interface__ = {"version": 3, **layout}


def memory_of(tensor: Any) -> np.ndarray:
    """Return a view of the bytes of a contiguous torch tensor on the CPU, whatever its dtype (NumPy has no bfloat16)."""
    size = tensor.numel() * tensor.element_size()
    return np.asarray(_Interface(tensor, data=(tensor.data_ptr(), False), shape=(size,), typestr="|u1"))


def as_array(tensor: Any) -> np.ndarray:
    """Return a contiguous torch tensor on the CPU as a NumPy array of its dtype, without a copy."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        import ml_dtypes  # comes with TVM

        dtype = np.dtype(ml_dtypes.bfloat16)
    else:
        dtype = np.dtype(name)
    return memory_of(tensor).view(dtype).reshape(tuple(tensor.shape))


def is_array(value: Any) -> bool:
    """Return whether a tensor is one of NumPy."""
    return isinstance(value, np.ndarray)


def _layout(x: Any) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Return the address of the first element, the shape, the strides in bytes, and the size of an element."""
    if is_array(x):
        return x.__array_interface__["data"][0], x.shape, x.strides, x.itemsize
    size = x.element_size()
    return x.data_ptr(), tuple(x.shape), tuple(stride * size for stride in x.stride()), size


def span(x: Any) -> tuple[int, int]:
    """Return the address of the first byte of ``x`` and that after its last one, as if all between belonged to it."""
    address, shape, strides, size = _layout(x)
    if 0 in shape:
        return address, address
    steps = [(n - 1) * stride for n, stride in zip(shape, strides)]
    return address + sum(min(s, 0) for s in steps), address + sum(max(s, 0) for s in steps) + size


def repeats(x: Any) -> bool:
    """Return whether several elements of ``x`` are one in memory, as those of an expanded tensor are."""
    _, shape, strides, _ = _layout(x)
    return any(n > 1 and stride == 0 for n, stride in zip(shape, strides))


def share_memory(a: Any, b: Any) -> bool:
    """Return whether ``a`` and ``b`` have a byte in common, or may have where that takes long to find out."""
    try:
        return np.shares_memory(_elements(a), _elements(b), max_work=MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _elements(x: Any) -> np.ndarray:
    address, shape, strides, size = _layout(x)
    return np.asarray(_Interface(x, data=(address, False), shape=shape, strides=strides, typestr=f"|V{size}"))


def shared_pair(tensors: Sequence[Any], written: Collection[int]) -> tuple[int, int] | None:
    """Return the indices of two of the tensors that have memory in common, one of which is ``written``; None where there are none."""
    spans = [span(x) for x in tensors]
    order = sorted(range(len(tensors)), key=spans.__getitem__)
    for rank, i in enumerate(order):
        for j in order[rank + 1 :]:
            if spans[j][0] >= spans[i][1]:
                break
            if (i in written or j in written) and share_memory(tensors[i], tensors[j]):
                return min(i, j), max(i, j)
    return None


class Region:
    """The memory between the first and the last byte of each of some tensors."""

    def __init__(self, tensors: Iterable[Any]):
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in sorted(span(x) for x in tensors):
            if self.ends and start < self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def touches(self, x: Any) -> bool:
        """Return whether a byte of ``x`` lies in the region."""
        start, end = span(x)
        before = bisect_left(self.starts, end)  # so many parts begin before the end of x
        return before > 0 and self.ends[before - 1] > start
