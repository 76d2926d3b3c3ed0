"""Means of values instead of an attention: against the matrix of the means, and within the budget."""

from __future__ import annotations

import pytest
import torch

import thresher
from helpers.attention import SLOW, Layers, canonical, sequences
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from helpers.sites import site
from thresher import Budget
from thresher.analysis.attention.sites import SDPA, attention_sites
from thresher.approximation.calibration import Calibration
from thresher.ir.folded_module import to_module
from thresher.passes.attention.pool_values import PoolValues, Window, mean_of_values, windows_of
from thresher.passes.attention.pool_values import edit as replace_by_mean
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [Window(0), Window(5), Window(3, 8), Window(3, 7, 15)], ids=str)
def test_means_of_values(window: Window, masked: bool) -> None:
    """Against a product with the matrix of the means, in the graph and compiled."""
    x = sequences(1)[0]
    there = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) > 0.3
    there[:, 20] = True
    inputs = (x, there) if masked else (x,)
    program = canonical(Layers(1), *inputs)
    (site,) = attention_sites(program)[0]
    place = torch.arange(64) - window.prefix
    if not window.size:
        near = torch.ones(64, 64, dtype=torch.bool)
    elif window.side:
        row, column = place // window.side, place % window.side
        reach = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= window.size // 2
        near = torch.where(place[:, None] < 0, torch.ones(()).bool(), reach & (place >= 0))
    else:
        near = (place[:, None] - place).abs() <= window.size // 2
    near = near & (there if masked else torch.ones(1, 64).bool())
    values: dict = {}
    program.run(*inputs, watch=values.__setitem__)
    wanted = (near / near.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype) @ values[site.v]
    found = mean_of_values(lambda f, *args: f(*args), site, values[site.v], there.float() if masked else None, window)
    assert not compare([wanted], [found]).exceeds(1e-5)
    work = program.clone()
    replace_by_mean(work, site.node.name, window)
    work.clean().verify()
    assert not list(work.calls(SDPA)) and len(list(work.calls(torch.ops.aten.linear.default))) == 2
    compiled = thresher.compile(to_module(work), inputs, passes="none")
    assert not compare(work.run(*inputs), [compiled(*inputs)]).exceeds(1e-5)


def test_attention_to_everything_becomes_a_mean() -> None:
    """One layer whose queries are all but nothing; the other stays."""
    model = Layers(2)
    with torch.no_grad():
        model.maps[1][0].weight *= 0.01
        model.maps[1][0].bias *= 0.01
        model.maps[0][0].weight *= 20
    data = sequences(12)
    program = canonical(model, data[0])
    (first, last) = attention_sites(program)[0]
    assert Window(0) in windows_of(last, (0, 3)) and Window(3, 8) in windows_of(last, (0, 3))
    calibration = Calibration.of(program, data, Budget(rel_l2=0.02))
    manager = PassManager([PoolValues()])
    result = manager.run(program, Context(machine=SLOW, calibration=calibration))
    assert [n.name for n in result.calls(SDPA)] == [first.node.name]
    assert [n.message for n in manager.records[0].rewrites] == ["the mean of all values"]
    assert manager.ledger[0].held_out.bound <= 0.02


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
  %sum_dim_int_list = aten.sum.dim_IntList(%v, [2], True) : f32[1, 2, 1, 4]
  %div = aten.div.Tensor(%sum_dim_int_list, 64) : f32[1, 2, 1, 4]
  %expand = aten.expand.default(%div, [1, 2, 64, 4]) : f32[1, 2, 64, 4]
  return [%expand]
}
"""


def test_before_and_after() -> None:
    check_rewrite("pool-values{windows=(0,)}", BEFORE, AFTER, context=calibrated(10.0))


REFUSALS = [
    ("no mean in its place: *", lambda: site(rest=", None, 0.0, True")),
    ("causal: it would look ahead", lambda: site(rest=", None, 0.0, True")),
    (
        "its mask differs from query to query, a mean would mix allowed and forbidden values",
        lambda: site(rest=", %pairs"),
    ),
    ("groups of query heads share its values", lambda: site(shared=1, rest=", enable_gqa=True")),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("pool-values", sentence, build, context=calibrated(10.0))
