"""Means of keys: exact where keys are equal, measured as built, and within the budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.attention import SLOW, Layers, canonical, sequences
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from helpers.sites import site
from thresher import Budget
from thresher.analysis.attention.sites import SDPA, attention_sites
from thresher.approximation.calibration import Calibration
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.nodes import shape_of
from thresher.passes.attention._pooling import poolings
from thresher.passes.attention.pool_keys import PoolKeys, _pooled, edit
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_means_of_equal_keys_are_exact(fused: bool, masked: bool) -> None:
    x = sequences(1, 128, 4)[0]
    there = (torch.arange(128) % 8 < 4).reshape(1, -1)
    there[:, 0::4] = False  # of some runs a part is masked, of others all
    inputs = (x, there) if masked else (x,)
    program = canonical(Layers(1, fused), *inputs)
    work = program.clone()
    (pooling,) = [p for p in poolings(128, (4,))]
    edit(work, attention_sites(work)[0][0].node.name, pooling)
    work.clean().verify()
    assert shape_of(next(work.calls(SDPA)).args[1])[2] == 32
    assert compare(program.run(*inputs), work.run(*inputs)).relative < 1e-5


def test_the_error_is_measured_on_what_is_built() -> None:
    x = sequences(1)[0]
    program = canonical(Layers(1), x)
    (site,) = attention_sites(program)[0]
    values: dict = {}
    program.run(x, watch=values.__setitem__)
    pooling = poolings(64, (2,))[-1]
    work = program.clone()
    edit(work, site.node.name, pooling)
    seen: dict = {}
    work.clean().run(x, watch=lambda node, value: seen.__setitem__(node.name, value))
    assert not compare([_pooled(site, values, pooling)], [seen[site.node.name]]).exceeds(1e-5)


def test_squares_of_an_image_and_what_stands_before_it() -> None:
    pooling = poolings(1 + 14 * 14, (4,))[0]
    assert pooling.count == 1 + 7 * 7 and pooling.assign[0] == 0
    image = pooling.assign[1:].reshape(14, 14)
    assert image[0, 0] == image[1, 1] == image[0, 1] == 1 and image[0, 2] == 2 and image[2, 0] == 8


def test_smooth_keys_are_averaged_within_the_budget() -> None:
    data = [x + 0.01 * torch.randn_like(x) for x in sequences(12, 128, 2)]
    program = canonical(Layers(2), data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.01))
    manager = PassManager([PoolKeys()])
    result = manager.run(program, Context(machine=SLOW, calibration=calibration))
    assert {shape_of(n.args[1])[2] for n in result.calls(SDPA)} == {64}
    assert manager.ledger[0].held_out.bound <= 0.01
    compiled = thresher.compile(to_module(result), (data[0],), passes="none")
    assert not compare(result.run(data[1]), [compiled(data[1])]).exceeds(1e-4)


def test_causal_keys_are_not_averaged() -> None:
    class Causal(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    data = list(torch.randn(8, 1, 2, 128, 8))
    program = capture(Causal(), (data[0],))
    manager = PassManager([PoolKeys()])
    manager.run(program, Context(calibration=Calibration.of(program, data, Budget(rel_l2=0.5))))
    assert "look ahead" in manager.records[0].refusals[0].message


BEFORE = """\
program model {
  %q = input : f32[1, 2, 64, 4]
  %k = input : f32[1, 2, 64, 4]
  %v = input : f32[1, 2, 64, 4]
  %y = aten.scaled_dot_product_attention.default(%q, %k, %v) : f32[1, 2, 64, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 2, 64, 4]
  %k = input : f32[1, 2, 64, 4]
  %v = input : f32[1, 2, 64, 4]
  %token_sizes = constant "token_sizes" : f32[1, 64]
  %y_means = constant "y_means" : i64[1, 64]
  %y_members = constant "y_members" : f32[1, 32]
  %y_even = constant "y_even" : f32[1, 64]
  %unsqueeze = aten.unsqueeze.default(%token_sizes, 2) : f32[1, 64, 1]
  %reduce_tokens = thresher.reduce_tokens.default(%unsqueeze, %y_even, %y_means, 32) : f32[1, 32, 1]
  %squeeze = aten.squeeze.dim(%reduce_tokens, 2) : f32[1, 32]
  %mul = aten.mul.Tensor(%squeeze, %y_members) : f32[1, 32]
  %log = aten.log.default(%mul) : f32[1, 32]
  %reshape = aten.reshape.default(%log, [1, 1, 1, 32]) : f32[1, 1, 1, 32]
  %permute = aten.permute.default(%k, [0, 2, 1, 3]) : f32[1, 64, 2, 4]
  %reshape_1 = aten.reshape.default(%permute, [1, 64, 8]) : f32[1, 64, 8]
  %reduce_tokens_1 = thresher.reduce_tokens.default(%reshape_1, %token_sizes, %y_means, 32) : f32[1, 32, 8]
  %reshape_2 = aten.reshape.default(%reduce_tokens_1, [1, 32, 2, 4]) : f32[1, 32, 2, 4]
  %permute_1 = aten.permute.default(%reshape_2, [0, 2, 1, 3]) : f32[1, 2, 32, 4]
  %permute_2 = aten.permute.default(%v, [0, 2, 1, 3]) : f32[1, 64, 2, 4]
  %reshape_3 = aten.reshape.default(%permute_2, [1, 64, 8]) : f32[1, 64, 8]
  %reduce_tokens_2 = thresher.reduce_tokens.default(%reshape_3, %token_sizes, %y_means, 32) : f32[1, 32, 8]
  %reshape_4 = aten.reshape.default(%reduce_tokens_2, [1, 32, 2, 4]) : f32[1, 32, 2, 4]
  %permute_3 = aten.permute.default(%reshape_4, [0, 2, 1, 3]) : f32[1, 2, 32, 4]
  %y = aten.scaled_dot_product_attention.default(%q, %permute_1, %permute_3, attn_mask=%reshape, scale=0.5) : f32[1, 2, 64, 4]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("pool-keys{factors=(2,)}", BEFORE, AFTER, context=calibrated(10.0))


REFUSALS = [
    ("its keys are not averaged: *", lambda: site(rest=", None, 0.0, True")),
    ("causal: a mean would look ahead", lambda: site(rest=", None, 0.0, True")),
    (
        "its mask differs from query to query, a mean would mix allowed and forbidden keys",
        lambda: site(rest=", %pairs"),
    ),
    ("* keys are few already", lambda: site(keys=20)),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("pool-keys", sentence, build, context=calibrated(10.0))
