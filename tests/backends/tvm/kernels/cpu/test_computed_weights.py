"""Layers whose weight another layer computes (hypernetworks, dynamic convolutions): packed when it is there, for our products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thresher
from helpers.compiled import compiled_and_equal
from helpers.modules import Function


def checked(function: Callable[..., Tensor], *args: Tensor) -> thresher.Compiled:
    return compiled_and_equal(Function(function), *args, tolerance=2e-6)


def kernels(compiled: thresher.Compiled, name: str) -> int:
    return sum(name in kernel for kernel, _ in compiled.executable.kernels)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_convolutions(data: st.DataObject) -> None:
    rank, groups, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    inputs, outputs = data.draw(st.integers(1, 20)), data.draw(st.integers(8, 40))
    kernel, stride, padding, dilation = (
        [data.draw(st.integers(least, most)) for _ in range(rank)] for least, most in ((1, 3), (1, 2), (0, 2), (1, 2))
    )
    size = [(k - 1) * d + 1 + data.draw(st.integers(0, 6)) for k, d in zip(kernel, dilation)]
    torch.manual_seed(0)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    checked(
        lambda x, w, b: convolve(x, w, b, stride, padding, dilation, groups).relu(),
        torch.randn(batch, groups * inputs, *size),
        torch.randn(groups * outputs, inputs, *kernel),
        torch.randn(groups * outputs),
    )


@pytest.mark.parametrize("lead", [(6,), (2, 3, 5)])
def test_linear(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    args = torch.randn(*lead, 20), torch.randn(37, 20), torch.randn(37)
    compiled = checked(lambda x, w, b: F.linear(x, w, b).relu(), *args)
    assert kernels(compiled, "batched") + kernels(compiled, "matmul") >= 1


def test_experts_mixed_before_the_convolution() -> None:
    """CondConv (Yang et al., 2019): a weight a sample, the samples as groups."""
    torch.manual_seed(0)
    compiled = checked(
        lambda x, w: F.conv2d(x.reshape(1, -1, 9, 9), w.reshape(-1, 8, 3, 3), padding=1, groups=2).reshape(2, 16, 9, 9),
        torch.randn(2, 8, 9, 9),
        torch.randn(2, 16, 8, 3, 3),
    )
    assert kernels(compiled, "pack") == kernels(compiled, "conv") == 1
