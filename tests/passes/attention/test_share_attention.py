"""Attention weights that are taken over from the layer before."""

from __future__ import annotations

import pytest
import torch

from helpers.attention import Layers, canonical, sequences
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher import Budget
from thresher.analysis.attention.sites import SDPA
from thresher.approximation.calibration import Calibration
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.passes.attention.share_attention import ShareAttention
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager


def test_weights_are_taken_over_from_layers_that_are_alike() -> None:
    model = Layers(3)
    with torch.no_grad():
        for maps in model.maps:
            maps[0].load_state_dict(model.maps[0][0].state_dict())
            maps[1].load_state_dict(model.maps[0][1].state_dict())
            maps[3].weight *= 0.02
    data = sequences(12)
    program = canonical(model, data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.02))
    manager = PassManager([ShareAttention()])
    result = manager.run(program, Context(calibration=calibration))
    assert len({n.args[:2] for n in result.calls(SDPA)}) == 1
    linears = [len(list(p.calls(torch.ops.aten.linear.default))) for p in (program, result)]
    assert linears == [12, 8]


BEFORE = """\
program model {
  %x = input : f32[1, 32, 16]
  %weight = constant "weight" : f32[16, 16]
  %heads = aten.reshape.default(%x, [1, 32, 2, 8]) : f32[1, 32, 2, 8]
  %k = aten.permute.default(%heads, [0, 2, 1, 3]) : f32[1, 2, 32, 8]
  %first = aten.scaled_dot_product_attention.default(%k, %k, %k) : f32[1, 2, 32, 8]
  %linear = aten.linear.default(%x, %weight) : f32[1, 32, 16]
  %queries = aten.reshape.default(%linear, [1, 32, 2, 8]) : f32[1, 32, 2, 8]
  %q = aten.permute.default(%queries, [0, 2, 1, 3]) : f32[1, 2, 32, 8]
  %y = aten.scaled_dot_product_attention.default(%q, %k, %first) : f32[1, 2, 32, 8]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[1, 32, 16]
  %heads = aten.reshape.default(%x, [1, 32, 2, 8]) : f32[1, 32, 2, 8]
  %k = aten.permute.default(%heads, [0, 2, 1, 3]) : f32[1, 2, 32, 8]
  %first = aten.scaled_dot_product_attention.default(%k, %k, %k) : f32[1, 2, 32, 8]
  %y = aten.scaled_dot_product_attention.default(%k, %k, %first) : f32[1, 2, 32, 8]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("share-attention", BEFORE, AFTER, context=calibrated(10.0))


def different_masks() -> Program:
    return parse(
        """
        %q = input : f32[1, 2, 8, 4]
        %a = aten.scaled_dot_product_attention.default(%q, %q, %q) : f32[1, 2, 8, 4]
        %y = aten.scaled_dot_product_attention.default(%a, %q, %q, None, 0.0, True) : f32[1, 2, 8, 4]
        return [%y]"""
    )


REFUSALS = [("the attention before it has other shapes, another mask or another scale", different_masks)]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("share-attention", sentence, build, context=calibrated(10.0))
