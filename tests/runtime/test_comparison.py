"""One comparison for both loaders: dtypes and their tolerances, NaN and infinities, literals, shapes, steps."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from thresher.runtime.comparison import Check, Truth, check_outputs, compare

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


def test_large_integers_are_compared_as_such() -> None:
    """float64 does not tell them apart."""
    large = np.array([2**60, 3])
    assert passed(large, large) and not passed(large, large + np.array([1, 0]))


def test_dtypes_must_be_equal() -> None:
    check = check_outputs("x", [np.zeros(2, "int64")], [np.zeros(2, "int32")])
    assert not check.passed and check.detail == "output 0 is int32 instead of int64"


def test_each_output_has_the_tolerance_of_its_dtype() -> None:
    reference = [np.array([1.0, 2.0], "float16"), np.array([1.0, 2.0], "float32"), np.array([7, 100])]
    assert check_outputs("x", reference, [reference[0] * np.float16(1.01), *reference[1:]]).passed
    for index, change in ((1, np.float32(1.001)), (2, 2)):
        wrong = [v * change if i == index else v for i, v in enumerate(reference)]
        assert not check_outputs("x", reference, wrong).passed


def test_the_check_names_the_output_that_is_nearest_to_its_tolerance() -> None:
    reference = [np.ones(2, "float16"), np.ones(2, "float32")]
    check = check_outputs("x", reference, [reference[0] * np.float16(1.001), reference[1] * np.float32(1 + 5e-5)])
    assert check.passed and check.tolerance == 1e-4 and check.error == pytest.approx(5e-5, rel=0.01)


def test_a_check_that_was_not_made() -> None:
    check = Check.not_made("random input", "it fails")
    assert check.passed and not check.excused and str(check) == "random input: not made: it fails"


def test_the_truth_of_complex_numbers_and_infinities() -> None:
    """Parts are finite or not for themselves; what is not finite must be so in the truth."""
    truth = Truth([np.array([1 + 1j, np.inf + 1j, np.nan])], [np.array([1.0, 0.0, 0.0])])
    reference = np.array([1.5 + 1j, np.inf + 1j, np.nan], "complex64")

    def verdict(value: list) -> bool:
        return check_outputs("x", [reference], [np.array(value, "complex64")], truth=lambda: truth).passed

    assert verdict([2 + 2j, np.inf + 1j, np.nan]) and verdict([5 + 1j, np.inf + 7j, np.nan])
    assert not verdict([20 + 1j, np.inf + 1j, np.nan])
    assert not verdict([2 + 2j, -np.inf + 1j, np.nan]) and not verdict([2 + 2j, np.inf + 1j, 0.0])


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


def test_numbers_that_are_read_of_tensors_are_rounded() -> None:
    assert passed(0.3, 0.3000001) and not passed(0.3, 0.301) and not passed(3, 4)


def test_steps_allow_what_rounding_moves() -> None:
    reference, moved = np.array([1.0, 2.0], "float32"), np.array([1.0, 2.2], "float32")
    assert not passed(reference, moved) and passed(reference, moved, steps=0.11)


def test_views_of_torch_that_numpy_does_not_know() -> None:
    x = torch.randn(3, dtype=torch.complex64)
    assert compare([x.conj()], [x.conj().resolve_conj()]).relative == 0
    assert compare([x.conj().imag], [-x.imag]).relative == 0
