"""Convolutions of groups that are wider than a register: one product for all of them, also where a group does not fill whole registers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thresher
from helpers.compiled import compiled_and_equal


def checked(layer: nn.Module, x: torch.Tensor) -> thresher.Compiled:
    return compiled_and_equal(nn.Sequential(layer, nn.ReLU()), x, tolerance=2e-6)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    kernel, stride, dilation = (data.draw(st.tuples(st.integers(1, n), st.integers(1, n))) for n in (5, 3, 2))
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [(k - 1) * d + 1 - min(2 * p, (k - 1) * d) for k, d, p in zip(kernel, dilation, padding)]
    size = [data.draw(st.integers(n, n + 12)) for n in least]
    groups, batch = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 2))
    inputs, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(5, 70))
    torch.manual_seed(0)
    layer = nn.Conv2d(groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups=groups)
    checked(layer, torch.randn(batch, groups * inputs, *size))


@pytest.mark.parametrize("width", [16, 32, 40])  # RegNet's, ResNeXt's, and one of a pruned layer
@pytest.mark.parametrize("kernel", [1, 3])
def test_all_groups_are_one_kernel(width: int, kernel: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(9 * width, 9 * width, kernel, padding=kernel // 2, groups=9)
    kernels = [name for name, _ in checked(layer, torch.randn(1, 9 * width, 7, 7)).executable.kernels]
    assert len([name for name in kernels if "conv" in name]) == 1
    assert not any("concat" in name for name in kernels)


@pytest.mark.parametrize("layer", [nn.Conv1d(60, 90, 5, groups=3), nn.Conv3d(64, 96, (3, 1, 2), groups=2)], ids=str)
def test_other_dimensions(layer: nn.Module) -> None:
    checked(layer, torch.randn(2, layer.in_channels, *[9] * (layer.weight.ndim - 2)))


def test_a_deep_sum_in_slices() -> None:
    torch.manual_seed(0)
    checked(nn.Conv2d(320, 64, 3, groups=2), torch.randn(1, 320, 9, 9))


def test_for_another_cpu() -> None:
    """Registers of eight numbers: groups of 24 fill three of them."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(72, 72, 3, groups=3).eval(), torch.randn(1, 72, 9, 9)
    compiled = thresher.compile(model, (x,), target="cpu:x86-64-v3")
    assert [name for name, _ in compiled.executable.kernels if "ungroup" in name] == []
    torch.testing.assert_close(compiled(x), model(x).detach())
