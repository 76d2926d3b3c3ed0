"""Sums of any length against float64: long ones are sums of partial sums."""

from __future__ import annotations

import itertools

import pytest
import torch

import thresher
from helpers.modules import Function

SHAPES = [(96, 28, 28), (3, 5000, 8), (2, 130, 17), (4, 2, 4096), (197, 6), (1, 40000), (7, 11, 13, 9), (640, 640)]


def sums(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the sums over every choice of dimensions."""
    dims = [d for count in range(1, x.dim() + 1) for d in itertools.combinations(range(x.dim()), count)]
    return [*(x.sum(d) for d in dims), x.mean()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_all_dimensions(shape: tuple[int, ...]) -> None:
    """Of positive numbers: a chain of 40,000 additions would be off by 1e-5."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    compiled = thresher.compile(Function(sums).eval(), (x,), target="cpu", verify="off", library="never")
    for ours, exact in zip(compiled(x), sums(x.double())):
        assert float(((ours - exact) / exact).abs().max()) < 1e-6


def test_long_sums_of_other_types() -> None:
    x = torch.randint(-50, 90, (3, 640, 16), generator=torch.Generator().manual_seed(0))

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        return [x.sum(1), x.int().sum((0, 1)), x.double().sum(), x.half().sum((1, 2)), (x > 0).sum(1), x.float().norm()]

    compiled = thresher.compile(Function(function).eval(), (x,), target="cpu", verify="off", library="never")
    for ours, expected in zip(compiled(x), function(x)):
        torch.testing.assert_close(ours, expected)
