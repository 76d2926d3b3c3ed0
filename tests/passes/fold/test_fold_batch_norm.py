"""Batch norm moves into the layer before it, else after it, else it is one product and one sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.canonical import canonical
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.errors import ProgramError
from thresher.frontend.capture import capture
from thresher.ir.lineage import unfold
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.testing import settle


@pytest.mark.parametrize(
    ("model", "shape", "left"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 7, 7), 1),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 7), 1),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)), (2, 3, 7, 7), 3),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 7, 7), 3),
    ],
)
def test_batch_norm_folds(model: nn.Module, shape: tuple[int, ...], left: int) -> None:
    """Into the layer before, else into the layer after where no padding shows, else into one mul and one add."""
    from thresher.testing import settle

    program, _ = canonical(settle(model), torch.randn(shape), passes=[*pipelines.canonicalize, "fold-batch-norm"])
    assert len(list(program.calls())) == left


BEFORE = """\
program model {
  %x = input : f32[1, 3, 5, 5]
  %weight = constant "weight" : f32[4, 3, 3, 3]
  %gamma = constant "gamma" : f32[4]
  %beta = constant "beta" : f32[4]
  %mean = constant "mean" : f32[4]
  %var = constant "var" : f32[4]
  %conv = aten.conv2d.default(%x, %weight) : f32[1, 4, 3, 3]
  %bn = aten._native_batch_norm_legit_no_training.default(%conv, %gamma, %beta, %mean, %var, 0.1, 1e-05) : (f32[1, 4, 3, 3], f32[0], f32[0])
  %y = getitem(%bn, 0) : f32[1, 4, 3, 3]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[1, 3, 5, 5]
  %weight_1 = constant "weight_1" : f32[4, 3, 3, 3]
  %bias = constant "bias" : f32[4]
  %conv = aten.conv2d.default(%x, %weight_1, %bias) : f32[1, 4, 3, 3]
  return [%conv]
}
"""


def test_before_and_after() -> None:
    check_rewrite("fold-batch-norm", BEFORE, AFTER, constants={"var": torch.linspace(0.5, 2.0, 4)})


def tied_bias() -> nn.Module:
    """The bias of the convolution is the scale of the norm, too."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    model[1].weight = model[0].bias
    return model


REFUSALS = [
    (
        "the statistics or the affine parameters are computed, not constant",
        lambda: (Function(lambda x, mean: F.batch_norm(x, mean, torch.ones(3))), torch.randn(2, 3, 4), torch.randn(3)),
    ),
    ("one parameter stands in two places", lambda: (tied_bias(), torch.randn(2, 3, 5))),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("fold-batch-norm", sentence, build, ("evaluate-constants",))


def test_a_layer_without_bias_cannot_take_the_weight_that_was_trained_with_one() -> None:
    model = settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)))
    program = capture(model, (torch.randn(2, 3, 5, 5),))
    folded = PassManager(["evaluate-constants", "fold-batch-norm"]).run(program).rounded()
    (weight,) = (name for name, value in folded.constants.items() if value.dim() == 4)
    trained = {**folded.constants, weight: folded.constants[weight] * 1.5}
    with pytest.raises(
        ProgramError, match=r"1.weight was trained with a bias that it does not have: give the layer a bias"
    ):
        unfold(program.original.state, folded.lineage, folded.constants, trained)
    unchanged = unfold(program.original.state, folded.lineage, folded.constants, folded.constants)
    torch.testing.assert_close(unchanged["1.weight"], model[1].weight.detach())
