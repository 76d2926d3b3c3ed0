"""Means of keys, and weights taken over from the layer before: replacements of whole sites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from thresher import Budget
from thresher.analysis.attention.sites import SDPA, attention_sites
from thresher.analysis.cost.cost import machine_model
from thresher.approximation.calibration import Calibration
from thresher.approximation.search import Candidate
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.passes.attention.pool_keys import PoolKeys, _pooled, edit, poolings
from thresher.passes.attention.pool_values import PoolValues, Window, mean_of_values, windows_of
from thresher.passes.attention.pool_values import edit as replace_by_mean
from thresher.passes.attention.pyramid_attention import PyramidAttention, measure
from thresher.passes.attention.share_attention import ShareAttention
from thresher.passes.attention.skip_small_weights import SkipSmallWeights
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

SLOW = replace(machine_model("cpu"), flops=1e8, launch=0.0)  # on which even small products are worth saving


class Layers(nn.Module):
    """Attention layers with projections of their own or one for all three, a residual, and a mask of keys."""

    def __init__(self, count: int = 2, fused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.fused = fused
        self.maps = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(4)) for _ in range(count))
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        mask = None if there is None else there[:, None, None]
        for q, k, v, out in self.maps:  # type: ignore[misc]
            parts = self.qkv(x).chunk(3, -1) if self.fused else (q(x), k(x), v(x))
            heads = (t.reshape(*x.shape[:2], 2, 8).transpose(1, 2) for t in parts)
            x = x + out(F.scaled_dot_product_attention(*heads, mask).transpose(1, 2).reshape(x.shape))
        return x


def sequences(count: int, tokens: int = 64, repeated: int = 1) -> list[Tensor]:
    """Each token ``repeated`` times in a row."""
    x = torch.randn(count, 1, tokens // repeated, 16, generator=torch.Generator().manual_seed(0))
    return list(x.repeat_interleave(repeated, 2))


def canonical(model: nn.Module, *inputs: Tensor) -> Program:
    return PassManager(thresher.pipelines.exact).run(capture(model.eval(), inputs))


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


def test_causal_keys_are_not_averaged() -> None:
    class Causal(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    data = list(torch.randn(8, 1, 2, 128, 8))
    program = capture(Causal(), (data[0],))
    manager = PassManager([PoolKeys()])
    manager.run(program, Context(calibration=Calibration.of(program, data, Budget(rel_l2=0.5))))
    assert "look ahead" in manager.records[0].refusals[0].message


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
