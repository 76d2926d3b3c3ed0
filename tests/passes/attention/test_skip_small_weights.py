"""Blocks of small attention weights are left out, within the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.attention import SLOW, canonical
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from helpers.sites import site
from thresher import Budget
from thresher.approximation.calibration import Calibration
from thresher.ir.folded_module import to_module
from thresher.passes.attention.skip_small_weights import SkipSmallWeights
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare


def test_small_weights_are_left_out_within_the_budget() -> None:
    class Peaked(nn.Module):
        """Every token looks at those like it, which lie together."""

        def forward(self, x: Tensor) -> Tensor:
            q = x.reshape(1, 128, 2, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(3 * q, q, q).transpose(1, 2).reshape(1, 128, 16)

    groups = torch.randn(12, 1, 4, 16, generator=torch.Generator().manual_seed(0)) * 2
    data = [g.repeat_interleave(32, 1) + 0.1 * torch.randn(1, 128, 16) for g in groups]
    program = canonical(Peaked(), data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.01))
    manager = PassManager([SkipSmallWeights()])
    result = manager.run(program, Context(machine=SLOW, calibration=calibration))
    (note,) = manager.records[0].rewrites
    assert "left out" in note.message and manager.ledger[0].held_out.bound <= 0.01
    compiled = thresher.compile(to_module(result), (data[0],), passes="none")
    assert not compare(result.run(data[1]), [compiled(data[1])]).exceeds(1e-4)


BEFORE = """\
program model {
  %q = input : f32[1, 2, 64, 4]
  %k = input : f32[1, 2, 64, 4]
  %v = input : f32[1, 2, 64, 4]
  %bias = constant "bias" : f32[1, 1, 1, 64]
  %y = aten.scaled_dot_product_attention.default(%q, %k, %v, %bias) : f32[1, 2, 64, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 2, 64, 4]
  %k = input : f32[1, 2, 64, 4]
  %v = input : f32[1, 2, 64, 4]
  %bias = constant "bias" : f32[1, 1, 1, 64]
  %attention = thresher.sparse_attention.default(%q, %k, %v, %bias, None, None, 32, 32, 0.5, False, None, 4.0) : f32[1, 2, 64, 4]
  return [%attention]
}
"""


def test_before_and_after() -> None:
    check_rewrite(
        "skip-small-weights{skips=(4.0,)}",
        BEFORE,
        AFTER,
        constants={"bias": -20.0 * (torch.arange(64) >= 32).float().reshape(1, 1, 1, 64)},
        context=calibrated(10.0),
    )


REFUSALS = [("* queries and * keys are too few, blocks are left out from * on", lambda: site(keys=20))]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("skip-small-weights", sentence, build, context=calibrated(10.0))
