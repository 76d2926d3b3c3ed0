"""Constant factors behind layers, also through thresholds; and the way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.modules import Function
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

aten, SHRINK = torch.ops.aten, torch.ops.thresher.shrink.default
SCALE = torch.tensor([0.5, 2.0, -1.0, 0.0, 3.0])
POSITIVE = SCALE.abs() + 0.1


def folded(model: nn.Module, x: Tensor) -> Program:
    return PassManager([*pipelines.canonicalize, "fold-scale"]).run(capture(model.eval(), (x,)))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "layer", "x", "left"),
    [
        (lambda x, f: f(x) * SCALE, nn.Linear(4, 5), rand(3, 2, 4), 1),
        (lambda x, f: 0.5 * f(x), nn.Linear(4, 5, bias=False), rand(3, 4), 1),
        (lambda x, f: f(x) / 8, nn.Linear(4, 5), rand(3, 4), 1),
        (lambda x, f: f(x) * SCALE[:, None, None], nn.Conv2d(2, 5, 3), rand(1, 2, 6, 6), 1),
        (lambda x, f: F.softshrink(f(x) * SCALE, 0.2), nn.Linear(4, 5), rand(3, 4), 2),
        (lambda x, f: F.softshrink(f(x), 0.2) * POSITIVE, nn.Linear(4, 5), rand(3, 4), 2),
        (lambda x, f: 2 * F.hardshrink(f(x), 0.3), nn.Linear(4, 5), rand(3, 4), 2),
        (lambda x, f: 2 * F.relu(f(x) - 0.3), nn.Linear(4, 5), rand(3, 4), 2),
    ],
)
def test_factors_are_folded(function: Callable, layer: nn.Module, x: Tensor, left: int) -> None:
    program = folded(Function(function, layer), x)
    assert len(list(program.calls())) == left
    wanted = Function(function, layer).double()(x.double())
    assert not compare([wanted], program.run(x.double(), dtype=torch.float64)).exceeds(1e-6)  # constants of 32 bits


@pytest.mark.parametrize(
    ("function", "layer", "x"),
    [
        (lambda x, f: f(x) * x.mean(), nn.Linear(4, 5), rand(3, 4)),  # not constant
        (lambda x, f: f(x) * torch.arange(1.0, 4.0)[:, None], nn.Linear(4, 5), rand(3, 4)),  # another one for each row
        (lambda x, f: (y := f(x)) * 2 + y, nn.Linear(4, 5), rand(3, 4)),  # read elsewhere
        (lambda x, f: F.softshrink(f(x), 0.2) * SCALE, nn.Linear(4, 5), rand(3, 4)),  # of any sign, behind a threshold
        (lambda x, f: f(x) * SCALE[None, :, None, None], nn.ConvTranspose2d(2, 5, 3), rand(1, 2, 6, 6)),
        (lambda x, f: 2 / f(x), nn.Linear(4, 5), rand(3, 4)),
    ],
)
def test_what_stays(function: Callable, layer: nn.Module, x: Tensor) -> None:
    program = folded(Function(function, layer), x)
    assert any(n.target in (aten.mul.Tensor, aten.div.Tensor) for n in program.calls())
    wanted = Function(function, layer)(x)
    assert not compare([wanted], program.run(x)).exceeds(1e-5)


def test_the_way_back() -> None:
    """Training goes on with the folded weight; the original's is that one divided, and where the factor is 0 what it was."""
    import thresher

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gamma = nn.Linear(4, 5), nn.Parameter(SCALE.clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.gamma

    model, x = Scaled().eval(), rand(3, 4)
    small = thresher.rewrite(model, (x,))
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.5)
    state = small.unfold()
    other = Scaled()
    other.load_state_dict(state)
    alive = SCALE != 0
    assert torch.allclose(other.layer.weight[alive], 1.5 * model.layer.weight[alive])
    assert not compare([small(x)[:, alive]], [other(x)[:, alive]]).exceeds(1e-5)


BEFORE = """\
program model {
  %x = input : f32[2, 3]
  %weight = constant "weight" : f32[4, 3]
  %bias = constant "bias" : f32[4]
  %scale = constant "scale" : f32[4]
  %linear = aten.linear.default(%x, %weight, %bias) : f32[2, 4]
  %y = aten.mul.Tensor(%linear, %scale) : f32[2, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 3]
  %weight_1 = constant "weight_1" : f32[4, 3]
  %bias_1 = constant "bias_1" : f32[4]
  %linear = aten.linear.default(%x, %weight_1, %bias_1) : f32[2, 4]
  return [%linear]
}
"""


def test_before_and_after() -> None:
    check_rewrite("fold-scale", BEFORE, AFTER)
