"""Near keys, and means of the others: exact where keys are equal, measured as built."""

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
from thresher.analysis.attention.sites import attention_sites
from thresher.approximation.calibration import Calibration
from thresher.approximation.search import Candidate
from thresher.ir.folded_module import to_module
from thresher.passes.attention.pyramid_attention import PyramidAttention, measure
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_near_keys_and_means_of_the_others(masked: bool, follows: bool) -> None:
    """Equal keys in runs: a pyramid is exact where its means are of equal keys, and every key is seen once."""
    x = sequences(1, 256, 4)[0]
    there = torch.arange(256).reshape(1, -1) < 200
    inputs = (x, there) if masked else (x,)
    program = canonical(Layers(1), *inputs)
    rule = PyramidAttention(block=16)
    (site,) = attention_sites(program)[0]
    pyramid = rule.pyramid(site, "cpu")
    choices = [c for c in pyramid.choices().values() if c.means]
    scores = torch.randn(1, 1, pyramid.rows, pyramid.groups, generator=torch.Generator().manual_seed(0))
    for choice in choices:
        grid = pyramid.grid(choice, scores)
        seen = grid[:, :16].float() + grid[:, 16:].repeat_interleave(4, 1)[:, :16]
        assert bool((seen == 1).all())
    chosen = [
        Candidate((site.node.name, h), "", "", 0, 0, site.node.name, payload=(pyramid.blocks, choices[c]))
        for h, c in enumerate((-1, 1) if follows else (0, 1))
    ]
    work = rule.build(program, chosen).verify()
    assert {n for n, _ in to_module(work).named_parameters()} <= set(program.constants)  # nothing new to train
    assert compare(program.run(*inputs), work.run(*inputs)).relative < 1e-5
    compiled = thresher.compile(to_module(work), inputs, passes="none")
    assert not compare(work.run(*inputs), [compiled(*inputs)]).exceeds(1e-5)


def test_pyramids_within_the_budget() -> None:
    data = [x + 0.02 * torch.randn_like(x) for x in sequences(12, 256, 4)]
    program = canonical(Layers(2), data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.01))
    manager = PassManager([PyramidAttention(block=16)])
    manager.run(program, Context(machine=SLOW, calibration=calibration))
    assert any("means" in n.message for n in manager.records[0].rewrites)
    assert manager.ledger[0].held_out.bound <= 0.01


def test_what_is_seen_is_what_is_measured() -> None:
    """One head over a window alone, one over the keys that promise most and the means of the others, one over everything."""

    class Three(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(1, 3, 256, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    program, rule = canonical(Three(), q, k, v), PyramidAttention(block=16)
    (site,) = attention_sites(program)[0]
    pyramid = rule.pyramid(site, "cpu")
    choices = pyramid.choices()
    words = ["the 64 keys around", "the 128 most promising keys, means of 4 of the others"]
    errors, _ = measure(program, [pyramid], [[q, k, v]])
    chosen = [
        Candidate((site.node.name, h), "", "", 0, 0, site.node.name, payload=(pyramid.blocks, choices[w]))
        for h, w in enumerate(words)
    ]
    work = rule.build(program, chosen).verify()
    (dense,), (found,) = program.run(q, k, v), work.run(q, k, v)
    assert not compare([dense[:, 2:]], [found[:, 2:]]).exceeds(1e-5)
    for h, w in enumerate(words):
        wanted = (found - dense)[:, h].square().sum().item()
        assert float(errors[site.node].sums[w][h]) == pytest.approx(wanted, rel=1e-3) and wanted > 0.1
    compiled = thresher.compile(to_module(work), (q, k, v), passes="none")
    assert not compare([found], [compiled(q, k, v)]).exceeds(1e-5)


BEFORE = """\
program model {
  %q = input : f32[1, 1, 128, 4]
  %k = input : f32[1, 1, 128, 4]
  %v = input : f32[1, 1, 128, 4]
  %y = aten.scaled_dot_product_attention.default(%q, %k, %v) : f32[1, 1, 128, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 1, 128, 4]
  %k = input : f32[1, 1, 128, 4]
  %v = input : f32[1, 1, 128, 4]
  %token_sizes = constant "token_sizes" : f32[1, 128]
  %y_means = constant "y_means" : i64[1, 128]
  %y_members = constant "y_members" : f32[1, 32]
  %y_even = constant "y_even" : f32[1, 128]
  %y_unmasked = constant "y_unmasked" : f32[1, 1, 1, 128]
  %y_blocks = constant "y_blocks" : i32[1, 1, 8, 2]
  %y_counts = constant "y_counts" : i32[1, 1, 8]
  %unsqueeze = aten.unsqueeze.default(%token_sizes, 2) : f32[1, 128, 1]
  %reduce_tokens = thresher.reduce_tokens.default(%unsqueeze, %y_even, %y_means, 32) : f32[1, 32, 1]
  %squeeze = aten.squeeze.dim(%reduce_tokens, 2) : f32[1, 32]
  %mul = aten.mul.Tensor(%squeeze, %y_members) : f32[1, 32]
  %log = aten.log.default(%mul) : f32[1, 32]
  %reshape = aten.reshape.default(%log, [1, 1, 1, 32]) : f32[1, 1, 1, 32]
  %permute = aten.permute.default(%k, [0, 2, 1, 3]) : f32[1, 128, 1, 4]
  %reshape_1 = aten.reshape.default(%permute, [1, 128, 4]) : f32[1, 128, 4]
  %reduce_tokens_1 = thresher.reduce_tokens.default(%reshape_1, %token_sizes, %y_means, 32) : f32[1, 32, 4]
  %reshape_2 = aten.reshape.default(%reduce_tokens_1, [1, 32, 1, 4]) : f32[1, 32, 1, 4]
  %permute_1 = aten.permute.default(%reshape_2, [0, 2, 1, 3]) : f32[1, 1, 32, 4]
  %permute_2 = aten.permute.default(%v, [0, 2, 1, 3]) : f32[1, 128, 1, 4]
  %reshape_3 = aten.reshape.default(%permute_2, [1, 128, 4]) : f32[1, 128, 4]
  %reduce_tokens_2 = thresher.reduce_tokens.default(%reshape_3, %token_sizes, %y_means, 32) : f32[1, 32, 4]
  %reshape_4 = aten.reshape.default(%reduce_tokens_2, [1, 32, 1, 4]) : f32[1, 32, 1, 4]
  %permute_3 = aten.permute.default(%reshape_4, [0, 2, 1, 3]) : f32[1, 1, 32, 4]
  %cat = aten.cat.default([%k, %permute_1], 2) : f32[1, 1, 160, 4]
  %cat_1 = aten.cat.default([%v, %permute_3], 2) : f32[1, 1, 160, 4]
  %expand = aten.expand.default(%y_unmasked, [1, 1, 1, 128]) : f32[1, 1, 1, 128]
  %cat_2 = aten.cat.default([%expand, %reshape], 3) : f32[1, 1, 1, 160]
  %attention = thresher.sparse_attention.default(%q, %cat, %cat_1, %cat_2, %y_blocks, %y_counts, 16, 16, 0.5) : f32[1, 1, 128, 4]
  return [%attention]
}
"""


def test_before_and_after() -> None:
    check_rewrite("pyramid-attention{block=16}", BEFORE, AFTER, context=calibrated(10.0))


REFUSALS = [
    ("no means of its keys: *", lambda: site(rest=", None, 0.0, True")),
    ("causal: a mean would look ahead", lambda: site(rest=", None, 0.0, True")),
    (
        "its mask differs from query to query, a mean would mix allowed and forbidden keys",
        lambda: site(rest=", %pairs"),
    ),
    ("* keys are no whole blocks of *", lambda: site(keys=70)),
    ("* keys are too few", lambda: site()),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("pyramid-attention{block=16}", sentence, build, context=calibrated(10.0))
