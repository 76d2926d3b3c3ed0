"""The kernel of depthwise convolutions and of small groups against torch, over shapes that its tiles, tasks and borders do not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thresher
from helpers.compiled import compiled_and_equal
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu.depthwise import Window, tasks


def check(layer: nn.Module, x: torch.Tensor) -> None:
    compiled_and_equal(nn.Sequential(layer, nn.ReLU()), x, tolerance=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    kernel, stride, dilation = (data.draw(st.tuples(st.integers(1, n), st.integers(1, n))) for n in (5, 3, 2))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [(k - 1) * d + 1 - min(2 * p, (k - 1) * d) for k, d, p in zip(kernel, dilation, padding)]
    size = [data.draw(st.integers(n, n + 20)) for n in least]
    groups, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 2))
    inputs, outputs = data.draw(st.sampled_from([(1, 1), (1, 1), (1, 2), (1, 3), (2, 1), (3, 4), (4, 4), (8, 6)]))
    torch.manual_seed(0)
    check(
        nn.Conv2d(groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups=groups),
        torch.randn(batch, groups * inputs, *size),
    )


@pytest.mark.parametrize(
    ("channels", "size", "kernel"),
    [(96, 56, 3), (1152, 7, 5), (37, 31, 7), (8, 20, 13)],
)
def test_layers_of_real_models(channels: int, size: int, kernel: int) -> None:
    torch.manual_seed(0)
    check(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels),
        torch.randn(1, channels, size, size),
    )


def test_small_groups_are_one_kernel() -> None:
    """ResNeXt, and the depthwise layers of FastViT that double the channels."""
    for inputs, outputs in ((4, 4), (1, 2)):
        model, x = (
            nn.Conv2d(32 * inputs, 32 * outputs, 3, groups=32, padding=1).eval(),
            torch.randn(1, 32 * inputs, 8, 8),
        )
        executable = thresher.compile(model, (x,), target="cpu").executable
        assert [name for name, _ in executable.kernels if "conv" in name] == []
        assert len([name for name, _ in executable.kernels if "depthwise" in name]) == 1


def test_a_long_sequence() -> None:
    torch.manual_seed(0)
    check(nn.Conv1d(24, 24, 4, padding=3, groups=24), torch.randn(2, 24, 1000))


@given(
    st.integers(1, 4),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 150),
    st.integers(1, 8),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sampled_from([CpuInfo(8, 16, 2), CpuInfo(16, 32, 8), CpuInfo(4, 32, 1)]),
)
def test_tasks_cover_the_result(
    batch: int, height: int, width: int, registers: int, inputs: int, taps: int, stride: int, machine: CpuInfo
) -> None:
    window = Window((stride, stride), (1, 1), (0, 0))
    for task in tasks((batch, height, width), (registers * machine.lanes, inputs, taps, taps), window, machine, 16):
        assert 1 <= task.rows <= height
        assert task.pixels % task.step == 0 and task.pixels < width + task.step
        assert registers * machine.lanes % task.channels == 0 and task.channels % machine.lanes == 0
