"""Rows of results that end within a tile or a register, and transposed convolutions: the same values as eager, for any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import thresher
from thresher.backends.tvm.importing.converters.convolutions import phases_of
from thresher.backends.tvm.kernels.cpu.registers import register_part

TARGETS = ["cpu", "cpu:x86-64-v3"]  # of AVX2 where this machine has AVX-512


def check(model: nn.Module, x: torch.Tensor, target: str, **options) -> None:
    """``compile`` compares with eager and raises where it differs."""
    compiled = thresher.compile(model.eval(), (x,), target=target, verify="off", tune="never", **options)
    assert compiled(x).shape == model(x).shape


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=7, deadline=None)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(5, 13), st.booleans())
def test_products_of_any_width(target: str, inputs: int, outputs: int, size: int, residual: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(inputs, outputs, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).relu()
            z = self.second(y)
            return z + y if residual else z

    check(Block(), torch.randn(1, inputs, size, size), target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("channels", [3, 19, 20, 24, 67, 72])
def test_pools_norms_and_movement_of_odd_widths(target: str, channels: int) -> None:
    pools = nn.Sequential(nn.Conv2d(8, channels, 1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Softmax(1))
    check(pools, torch.randn(1, 8, 40, 40), target)
    check(nn.Sequential(nn.LayerNorm(channels), nn.Softmax(-1)), torch.randn(300, channels), target)
    depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
    check(nn.Sequential(depthwise, nn.SiLU(), nn.Conv2d(channels, 8, 1)), torch.randn(1, channels, 15, 15), target)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "extra", "dilation", "groups"),
    [
        (4, 2, 1, 0, 1, 1),
        (3, 2, 1, 1, 1, 2),
        (3, 2, 1, 1, 2, 1),
        (2, 3, 0, 0, 1, 1),
        (1, (1, 2), 0, 0, 1, 2),
        (4, 4, 1, 2, 3, 1),
        (7, 2, 3, 1, 1, 1),
        ((4, 3), (2, 1), (1, 1), 0, 1, 1),
    ],
)
def test_transposed_convolutions(kernel, stride, padding, extra, dilation, groups) -> None:
    layer = nn.ConvTranspose2d(8, 6, kernel, stride, padding, extra, groups, dilation=dilation)
    check(nn.Sequential(layer, nn.ReLU()), torch.randn(2, 8, 9, 7), "cpu")


@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 6), st.integers(1, 3))
def test_phases_take_every_tap_once(taps: int, stride: int, padding: int, dilation: int) -> None:
    phases_found = phases_of(taps, stride, padding, dilation)
    assert sorted(t for phase in phases_found for t in phase.taps) == list(range(taps))
    for q, phase in enumerate(phases_found):
        for place, tap in enumerate(phase.taps):  # input pixel i reaches output stride i - padding + tap dilation
            assert stride * (phase.start + place * phase.step) - padding + tap * dilation == q


def test_parts_of_registers() -> None:
    assert [register_part(n, 16) for n in (64, 72, 68, 67, 8, 3)] == [16, 8, 4, 0, 8, 0]
    assert [register_part(n, 8) for n in (64, 72, 68, 66)] == [8, 8, 4, 0]


class Narrow(nn.Module):
    """A residual of ``wide`` channels, to which ``narrow`` ones are added."""

    def __init__(self, narrow: int, wide: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.inner = nn.Conv2d(wide, narrow, kernel, padding=kernel // 2, bias=bias)
        self.behind = wide - narrow

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (nn.functional.pad(self.inner(x), (0, 0, 0, 0, 0, self.behind)) + x).relu()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("narrow", "wide", "kernel", "bias"),
    [(64, 128, 1, True), (40, 96, 1, False), (7, 100, 1, True), (33, 67, 3, True), (32, 33, 1, True), (3, 5, 3, False)],
)
def test_a_narrow_addend_is_added_in_the_product(target: str, narrow: int, wide: int, kernel: int, bias: bool) -> None:
    model, x = Narrow(narrow, wide, kernel, bias).eval(), torch.randn(1, wide, 14, 13)
    compiled = thresher.compile(model, (x,), target=target, verify="off", tune="never", strict_rounding=True)
    words = [line.split() for line in compiled.executable.code.as_text().splitlines() if "call" in line]
    kernels = [name for _, name, *_ in words if not name.startswith("vm.")]
    (product,) = [name for name in kernels if "conv" in name]
    assert product.startswith("fused_conv_add_add" if bias else "fused_conv_add_")
    assert [name for name in kernels if "pad" in name] == (["pad"] if kernel > 1 else [])
