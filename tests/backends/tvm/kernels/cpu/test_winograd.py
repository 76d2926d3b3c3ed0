"""Winograd convolutions: every size, border and epilogue, and an error that stays where float32 can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.modules import Amplifier
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu import winograd


class Net(nn.Module):
    """A residual sum, an activation and a bias behind the convolution."""

    def __init__(self, inputs: int, outputs: int, padding: int, residual: bool):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.residual = nn.Conv2d(inputs, outputs, 3, padding=padding), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y + x if self.residual else y)


def always(monkeypatch, m: int) -> None:
    """Every 3x3 convolution by F(m x m, 3 x 3)."""
    honest = winograd.plans

    def plans(*args):
        return [plan for plan in honest(*args[:4], 32)[0] if plan.m == m][:1], True

    monkeypatch.setattr(winograd, "plans", plans)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(
    ("batch", "height", "width", "inputs", "outputs", "padding", "residual"),
    [
        (1, 8, 8, 16, 16, 1, True),
        (2, 7, 9, 16, 32, 1, False),
        (1, 6, 11, 32, 48, 0, False),
        (3, 5, 3, 16, 16, 2, False),
        (1, 9, 8, 19, 19, 1, True),
        (2, 7, 6, 16, 13, 1, False),
        (1, 8, 7, 21, 24, 1, False),
        (1, 10, 6, 16, 16, 0, False),
    ],
)
def test_equal_to_eager(
    m: int, batch: int, height: int, width: int, inputs: int, outputs: int, padding: int, residual: bool, monkeypatch
) -> None:
    always(monkeypatch, m)
    model, x = Net(inputs, outputs, padding, residual).eval(), torch.randn(batch, inputs, height, width)
    compiled = thresher.compile(model, (x,), target="cpu")
    with torch.no_grad():
        expected = model.double()(x.double())
    error = (compiled(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < (2e-6 if m == 2 else 2e-5)
    assert compiled.executable.weights[0].shape[0] == (m + 2) ** 2


def test_strict_rounding_does_without(monkeypatch) -> None:
    always(monkeypatch, 4)
    model, x = Net(16, 16, 1, True).eval(), torch.randn(1, 16, 8, 8)
    assert thresher.compile(model, (x,), target="cpu", strict_rounding=True).executable.weights[0].ndim != 4


def test_built_again_where_the_rounding_is_too_much(monkeypatch) -> None:
    """A result that misses its bound with the filtering is built without it, and is right."""
    always(monkeypatch, 4)
    exact = winograd.transform_filters
    monkeypatch.setattr(winograd, "transform_filters", lambda *a: exact(*a) * np.float32(1.001))
    model, x = Net(16, 16, 1, True).eval(), torch.randn(1, 16, 8, 8)
    compiled = thresher.compile(model, (x,), target="cpu")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert all(check.passed for check in compiled.report.checks)


def test_built_again_where_only_float64_would_excuse_it(monkeypatch) -> None:
    """A model that amplifies rounding, eager's too: it gets no worse than that."""

    class Chaotic(Amplifier):
        def __init__(self) -> None:
            super().__init__(depth=13, width=8)
            self.convolutions = Net(16, 16, 1, True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.amplified(self.convolutions(x))

    always(monkeypatch, 4)
    model, x = Chaotic().eval(), torch.randn(1, 16, 8, 8)
    filtered = thresher.compile(model, (x,), target="cpu", validate="off")
    compiled = thresher.compile(model, (x,), target="cpu")
    assert filtered.executable.rounds_more
    with torch.no_grad():
        eager, ours, truth = model(x), compiled(x), model.double()(x.double())
    assert not compiled.executable.rounds_more
    assert (ours - truth).abs().mean() < 2 * (eager - truth).abs().mean()
    assert (filtered(x) - truth).abs().mean() > 3 * (eager - truth).abs().mean()


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_are_a_convolution(m: int) -> None:
    """A^T [(G g G^T) * (B^T d B)] A, exactly, on small integers."""
    before, _, after = winograd.TRANSFORMS[m]
    generator = np.random.default_rng(0)
    d, g = (
        generator.integers(-5, 5, (m + 2, m + 2)).astype(float),
        generator.integers(-5, 5, (1, 1, 3, 3)).astype(float),
    )
    filters = winograd.transform_filters(g, m).reshape(m + 2, m + 2)
    found = after @ (filters * (before @ d @ before.T)) @ after.T
    expected = F.conv2d(torch.from_numpy(d)[None, None], torch.from_numpy(g))[0, 0].numpy()
    assert np.allclose(found, expected, atol=1e-12)


def test_chosen_where_it_saves() -> None:
    """Wide layers on large images; not where filters outweigh the image, nor where most of a register would be padding."""
    machine = CpuInfo(8, 16, 2, 1 << 19)

    def chosen(size: int, inputs: int, outputs: int) -> int:
        plans, faster = winograd.plans(lambda m: winograd.Tiling(m, 1, size, size), inputs, outputs, machine)
        return plans[0].m if faster else 0

    assert chosen(56, 64, 64) == 4
    assert chosen(7, 512, 512) == 2
    assert chosen(2, 512, 512) == 0
    assert chosen(56, 60, 64) == 4
    assert chosen(56, 4, 64) == 0
