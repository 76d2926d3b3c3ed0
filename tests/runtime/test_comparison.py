"""One comparison for both loaders: dtypes and their tolerances, NaN and infinities, literals, shapes, steps."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from thresher.runtime.comparison import check_outputs, compare

NAN, INF = float("nan"), float("inf")


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array)


def passed(reference: Any, candidate: Any, steps: float = 0.0) -> bool:
    """The verdict, which must be the same for NumPy arrays and for torch tensors."""
    checks = [check_outputs("x", [reference], [candidate], steps)]
    if isinstance(reference, np.ndarray) and isinstance(candidate, np.ndarray):
        checks.append(check_outputs("x", [as_torch(reference)], [as_torch(candidate)], steps))
        assert checks[0] == checks[1]
    return checks[0].passed


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        ("float64", 1e-10, 1e-8), ("float32", 5e-5, 2e-4), ("float16", 1e-2, 4e-2), (ml_dtypes.bfloat16, 5e-2, 2e-1),
        ("complex64", 5e-5, 2e-4), ("complex128", 1e-10, 1e-8),
    ],
)  # fmt: skip
def test_tolerances_of_dtypes(dtype: Any, good: float, bad: float) -> None:
    reference = np.array([1.0, 0.5]).astype(dtype)
    for error, expected in ((good, True), (bad, False)):
        assert passed(reference, np.array([1.0 + error, 0.5]).astype(dtype)) is expected


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_integers_are_exact(dtype: str) -> None:
    reference = np.array([100, 50]).astype(dtype)
    assert passed(reference, reference) and not passed(reference, reference + np.array(1, dtype))
    assert passed(reference, reference + np.array(1, dtype), steps=0.02)  # a quantised model that rounds


def test_booleans_are_exact() -> None:
    assert passed(np.array([True, False]), np.array([True, False]))
    assert not passed(np.array([True, False]), np.array([True, True]))


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        ([1, NAN], [1, NAN], True), ([1, INF], [1, INF], True), ([NAN], [NAN], True), ([1, NAN], [1, INF], False),
        ([1, INF], [1, -INF], False), ([1, NAN], [1, 2], False), ([1, 2], [1, INF], False),
    ],
)  # fmt: skip
def test_nan_and_infinities_are_kinds(reference: list, candidate: list, expected: bool) -> None:
    for dtype in (np.float32, np.float64, np.complex64):
        assert passed(np.array(reference, dtype), np.array(candidate, dtype)) is expected


def test_shapes_must_be_equal() -> None:
    assert not passed(np.zeros((2, 1)), np.zeros((2,))) and passed(np.zeros((2, 0)), np.zeros((2, 0)))
    assert "shape (2, 1) != (2,)" in compare([np.zeros((2, 1))], [np.zeros(2)]).reason


def test_literals_must_be_equal() -> None:
    assert passed(7, 7) and passed(None, None) and passed(NAN, NAN)
    assert not passed(7, 8) and not passed(7, 7.0) and not passed(7, np.array(7.0)) and not passed(1, True)


def test_steps_allow_what_rounding_moves() -> None:
    reference, moved = np.array([1.0, 2.0], "float32"), np.array([1.0, 2.2], "float32")
    assert not passed(reference, moved) and passed(reference, moved, steps=0.11)


def test_views_of_torch_that_numpy_does_not_know() -> None:
    x = torch.randn(3, dtype=torch.complex64)
    assert compare([x.conj()], [x.conj().resolve_conj()]).relative == 0
    assert compare([x.conj().imag], [-x.imag]).relative == 0
