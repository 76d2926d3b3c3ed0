"""Shared memory of tensors, against NumPy's exact answer and against a count of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thresher.runtime.memory import Region, as_array, memory_of, repeats, share_memory, shared_pair, span

MEMORY = torch.zeros(4, 6)
slices = st.builds(slice, st.integers(0, 3), st.integers(0, 6), st.integers(1, 3))
views = st.tuples(slices, slices)


def bytes_of(view: torch.Tensor) -> set[int]:
    """The addresses of all bytes of a view."""
    start = view.data_ptr()
    offsets = (sum(i * s for i, s in zip(index, view.stride())) for index in np.ndindex(*view.shape))
    return {start + 4 * offset + k for offset in offsets for k in range(4)}


@given(views, views, st.booleans())
def test_against_the_bytes(a: tuple, b: tuple, transposed: bool) -> None:
    one, other = MEMORY[a], MEMORY[b].T if transposed else MEMORY[b]
    common = bool(bytes_of(one) & bytes_of(other))
    assert share_memory(one, other) == common
    assert share_memory(one.numpy(), other.numpy()) == common
    assert (shared_pair([one, torch.zeros(3), other], {2}) == (0, 2)) == common
    if bytes_of(one):
        assert span(one) == (min(bytes_of(one)), max(bytes_of(one)) + 1)
    if common:
        assert Region([one, torch.zeros(2)]).touches(other)
    assert not Region([one]).touches(torch.zeros(4, 6))


def test_a_pair_counts_only_where_one_is_written() -> None:
    x = torch.zeros(3)
    assert shared_pair([x, x], set()) is None and shared_pair([x, x], {1}) == (0, 1)
    assert shared_pair([x[:0], x[:0]], {0, 1}) is None


def test_arrays_run_backwards() -> None:
    x = np.zeros(6)
    assert span(x[::-1]) == span(x) and share_memory(x[::-1], x[2:3])


def test_repeated_elements() -> None:
    assert repeats(torch.zeros(1, 3).expand(2, 3)) and repeats(np.broadcast_to(np.zeros(3), (2, 3)))
    assert not repeats(torch.zeros(1, 3).expand(1, 3)) and not repeats(torch.zeros(2, 3).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64])
def test_the_same_memory_as_an_array(dtype: torch.dtype) -> None:
    x = torch.ones(2, 3).to(dtype)
    array = as_array(x)
    assert array.shape == (2, 3) and str(array.dtype) == str(dtype).removeprefix("torch.")
    array[0] = 0
    assert x[0].eq(0).all() and memory_of(x).nbytes == x.nbytes
    assert as_array(torch.ones((), dtype=dtype)).shape == ()
