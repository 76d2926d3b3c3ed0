"""Near keys, and means of the others: exact where keys are equal, measured as built."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.attention import SLOW, Layers, canonical, sequences
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
