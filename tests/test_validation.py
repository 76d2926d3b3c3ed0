"""Comparison: what counts as equal, and what never does."""

from __future__ import annotations

import pytest
import torch

from thresher.validation import compare

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, NAN], [1.0, INF], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-3], False),
        ([1e9, 1.0], [1e9, 1.0 + 1e-3], True),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_compare(a: list, b: list, equal: bool) -> None:
    assert compare([torch.tensor(a)], [torch.tensor(b)]).exceeds(1e-6) is not equal


def test_compare_literals_and_counts() -> None:
    assert not compare([3, None], [3, None]).exceeds(0)
    assert compare([3], [4]).exceeds(1e9)
    assert compare([torch.ones(1)], []).exceeds(1e9)
    assert compare([torch.ones(1)], [1.0]).exceeds(1e9)


def test_the_worst_output_is_reported() -> None:
    found = compare([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.tensor([1.0, 1.5])])
    assert found.output == 1 and found.relative == 0.5
