"""Operators that are lowered as others, by torch's decompositions."""

from __future__ import annotations

import pytest
import torch

import thresher
from helpers.modules import Function


@pytest.mark.parametrize("shape", [(5, 16), (2, 16, 6)])
def test_weights_of_one_shape_are_not_taken_for_each_other(shape: tuple[int, ...]) -> None:
    """The four vectors of a batch norm that no pass folds: nodes may share their fake tensor, and did."""
    norm = torch.nn.BatchNorm1d(16).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(shape)
    compiled = thresher.compile(norm, (x,), passes="none", validate="off")
    torch.testing.assert_close(compiled(x), norm(x))


def test_one_input_twice() -> None:
    x = torch.randn(4, 4)
    model = Function(lambda x: torch.addmv(x[0], x, x[0]) + torch.addbmm(x, x[None], x[None]))
    compiled = thresher.compile(model, (x,), passes="none", validate="off")
    torch.testing.assert_close(compiled(x), model(x))
