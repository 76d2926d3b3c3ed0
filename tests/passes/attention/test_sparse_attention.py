"""Heads over fewer blocks: what is recommended for attention of a known shape, and that it is what it says."""

from __future__ import annotations

from dataclasses import replace as replace_fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from helpers.sites import site
from thresher import Budget
from thresher.analysis.attention.sites import attention_sites, head_weights
from thresher.analysis.cost.cost import machine_model
from thresher.approximation.calibration import Calibration
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.program import Program
from thresher.ops.sparse_attention import block_mask
from thresher.passes import pipelines
from thresher.passes.attention._block_sizes import Blocks
from thresher.passes.attention._head_errors import HeadErrors, each_head
from thresher.passes.attention._patterns import attended, planes, shapes
from thresher.passes.attention.sparse_attention import HeadPattern, SparseAttention, errors_of_heads, replace
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

SPARSE, SELECT = torch.ops.thresher.sparse_attention.default, torch.ops.thresher.select_blocks.default
TOKENS, HEADS, WIDTH = 128, 2, 8


class Layer(nn.Module):
    """Attention of two heads: one looks at its neighbours (positions are strong in its queries and keys), one at what is alike."""

    def __init__(self, local: float = 6.0):
        super().__init__()
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)
        place = torch.arange(TOKENS) / TOKENS * 2 * torch.pi
        circle = torch.stack([torch.cos(place), torch.sin(place)] * (WIDTH // 2), -1)
        self.register_buffer("place", circle[None, None] * local)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.reshape(-1, TOKENS, HEADS, WIDTH).transpose(1, 2)
        near = self.place.expand(x.shape[0], 1, -1, -1)
        q = torch.cat([near, heads[:, 1:]], 1)
        y = F.scaled_dot_product_attention(q, q, heads)
        return self.out(y.transpose(1, 2).reshape(-1, TOKENS, HEADS * WIDTH))


def samples(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 1, TOKENS, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed)))


def rewritten(
    model: nn.Module, budget: Budget, options: SparseAttention | None = None
) -> tuple[Program, PassManager, Calibration]:
    data = samples(12)
    program = capture(model, (data[0],))
    calibration = Calibration.of(program, data, budget)
    manager = PassManager([*pipelines.canonicalize, options or SparseAttention(block=16)])
    return manager.run(program, Context(calibration=calibration)), manager, calibration


def test_the_local_head_gets_a_local_pattern() -> None:
    torch.manual_seed(0)
    program, manager, _ = rewritten(Layer(), Budget(rel_l2=0.02))
    (node,) = program.calls(SPARSE)
    grid = block_mask(program.constant(node.args[4]), program.constant(node.args[5]), TOKENS // 16)[0]
    assert grid[0].float().mean() < 0.5 and grid[1].float().mean() > grid[0].float().mean()
    assert bool(grid[0].diagonal().all())
    assert manager.ledger[0].held_out.bound <= 0.02
    assert any("head 0" in n.message for n in manager.records[-1].rewrites)


def test_without_budget_nothing_changes() -> None:
    program, *_ = rewritten(Layer(), Budget(rel_l2=0.0))
    assert not list(program.calls(SPARSE))


def test_short_sites_are_refused_by_name() -> None:
    class Short(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    data = list(torch.randn(8, 1, 2, 20, 8))
    program = capture(Short(), (data[0],))
    manager = PassManager([SparseAttention()])
    manager.run(program, Context(calibration=Calibration.of(program, data, Budget(rel_l2=0.1))))
    assert "20 queries and 20 keys are too few" in manager.records[0].refusals[0].message


def test_errors_of_patterns_are_those_of_masked_attention() -> None:
    """The shortcut over blocks against attention under the mask, behind the projection."""
    torch.manual_seed(1)
    model, x = Layer(2.0), samples(1)[0]
    program = PassManager(pipelines.canonicalize).run(capture(model, (x,)))
    (site,) = attention_sites(program)[0]
    values: dict = {}
    program.run(x, watch=values.__setitem__)
    grid = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    grid.fill_diagonal_(True)
    errors = HeadErrors(head_weights(program, site))
    errors.add_output(values[site.node])
    each_head(site, values, Blocks(16, 16), lambda b, h, sample: errors.add(h, sample, {"some": grid}))
    q, k, v = (values[n].double() for n in (site.q, site.k, site.v))
    allowed = grid.repeat_interleave(16, 0).repeat_interleave(16, 1)
    off = F.scaled_dot_product_attention(q, k, v, allowed) - F.scaled_dot_product_attention(q, k, v)
    weight = model.out.weight.double().unflatten(1, (HEADS, WIDTH))
    for h in range(HEADS):
        wanted = (off[0, h] @ weight[:, h].T).square().sum()
        assert errors.listed["some"][h] == grid.sum()
        assert errors.sums["some"][h].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_a_choice_for_every_head_becomes_one_kernel() -> None:
    """One head over a window, one over what is selected, one dense: the operator against each head's own attention."""

    class Three(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(1, 3, 64, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    program = capture(Three(), (q, k, v))
    (site,) = attention_sites(program)[0]
    window = shapes(4, 4, 16, 16)["window of 16 tokens"][0]
    replace(
        program, site, Blocks(16, 16), {0: HeadPattern(window), 1: HeadPattern(torch.zeros(4, 4, dtype=torch.bool), 2)}
    )
    program.clean().verify()
    (found,) = program.run(q, k, v)
    dense = F.scaled_dot_product_attention(q, k, v)
    allowed = window.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert not compare([F.scaled_dot_product_attention(q[:, :1], k[:, :1], v[:, :1], allowed)], [found[:, :1]]).exceeds(
        1e-5
    )
    assert not compare([dense[:, 2:]], [found[:, 2:]]).exceeds(1e-5)
    assert compare([dense[:, 1:2]], [found[:, 1:2]]).exceeds(1e-3)
    assert len(list(program.calls(SELECT))) == 1
    compiled = thresher.compile(program_module(program), (q, k, v), passes="none")
    assert not compare([found], [compiled(q, k, v)]).exceeds(1e-5)


def test_blocks_by_what_they_promise_follow_the_input() -> None:
    """Where the means of keys tell who is looked at, few blocks have the mass, and other ones for other inputs."""

    class Alike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.reshape(1, TOKENS, HEADS, WIDTH).transpose(1, 2)
            return F.scaled_dot_product_attention(4 * q, q, q).transpose(1, 2).reshape(1, TOKENS, HEADS * WIDTH)

    groups = torch.randn(12, 1, 8, HEADS * WIDTH, generator=torch.Generator().manual_seed(0)) * 1.5
    order = torch.Generator().manual_seed(1)
    data = [g[:, torch.randint(0, 8, (8,), generator=order)].repeat_interleave(16, 1) for g in groups]
    program = capture(Alike(), (data[0],))
    calibration = Calibration.of(program, data, Budget(rel_l2=0.02))
    machine = replace_fields(machine_model("cpu"), flops=1e8, launch=0.0)
    manager = PassManager([SparseAttention(block=16, static=False)])
    result = manager.run(program, Context(machine=machine, calibration=calibration))
    assert any("promise" in n.message for n in manager.records[0].rewrites) and list(result.calls(SELECT))
    assert manager.ledger[0].held_out.bound <= 0.02


def program_module(program: Program) -> nn.Module:
    return to_module(program)


# ---------------------------------------------------------------------- patterns


def test_shapes() -> None:
    found = {name: p[0] for name, p in shapes(8, 8, 16, 16).items()}
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(found["window of 16 tokens"], (i - j).abs() <= 1)
    assert torch.equal(found["sinks and window of 16 tokens"], ((i - j).abs() <= 1) | (j == 0))
    assert torch.equal(found["groups of 32 tokens"], i // 2 == j // 2)
    assert torch.equal(found["every 2. block"], (i - j) % 2 == 0)


def test_planes_let_the_class_token_see_all() -> None:
    found = planes(8, 1, 16, 16)
    for grid in found.values():
        assert bool(grid[0, 0].all()) and bool(grid[0, :, 0].all())
    assert found["neighbourhood of 1 rows"].float().mean() < found["neighbourhood of 2 rows"].float().mean()


def test_attended_patterns_follow_the_mass() -> None:
    mass = torch.full((1, 6, 6), 0.01)
    mass[0, :, 3] = 1.0
    found = attended(mass, 16, 16)
    assert bool(found["1 stripes"][0, :, 3].all()) and found["1 stripes"].sum() == 6 + 5
    assert found["blocks with 90 % of the mass"].sum() == 6
    assert not found["nothing"].any()
    slash = torch.full((1, 6, 6), 0.01)
    slash[0, torch.arange(5), torch.arange(5) + 1] = 1.0
    assert bool(attended(slash, 16, 16)["1 stripes and 1 slashes"][0, torch.arange(5), torch.arange(5) + 1].all())


def test_many_blocks_are_asked_in_groups() -> None:
    """From 64 blocks on; what is chosen in groups is built in groups."""

    class Alike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.reshape(1, 512, 2, 8).transpose(1, 2)
            return F.scaled_dot_product_attention(4 * q, q, q).transpose(1, 2).reshape(1, 512, 16)

    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(64, 1)
    program = capture(Alike(), (x,))
    (site,) = attention_sites(program)[0]
    blocks = Blocks(8, 8)
    choices = SparseAttention(block=8, static=False).choices(site, blocks, torch.ones(2, 64, 64))
    (words,) = [w for w in choices if w.startswith("the 8 most") and "in the 2 most promising groups of 8" in w]
    errors = errors_of_heads(program, [site], {site.node: blocks}, {site.node: choices}, [[x]])[site.node]
    replace(program, site, blocks, {h: choices[words][h] for h in range(2)})
    (node,) = program.clean().calls(SELECT)
    assert node.args[-1] == 8 and program.constant(node.args[-2]).tolist() == [2, 2]
    (found,) = program.run(x)
    wanted = (found - Alike()(x)).square().sum()
    assert sum(errors.sums[words]).item() == pytest.approx(wanted.item(), rel=1e-3, abs=1e-6)


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
  %y_blocks = constant "y_blocks" : i32[1, 2, 2, 1]
  %y_counts = constant "y_counts" : i32[1, 2, 2]
  %attention = thresher.sparse_attention.default(%q, %k, %v, None, %y_blocks, %y_counts, 32, 32, 0.5, False) : f32[1, 2, 64, 4]
  return [%attention]
}
"""


def test_before_and_after() -> None:
    check_rewrite("sparse-attention{selected=false}", BEFORE, AFTER, context=calibrated(10.0))


REFUSALS = [
    ("*: stays dense", lambda: site(keys=20)),
    ("* queries and * keys are too few, blocks are left out from * on", lambda: site(keys=20)),
    ("GPUs leave out blocks in half precision only: convert the model with .half() or .bfloat16()", lambda: site()),
    ("the budget is 0: nothing is approximated", lambda: site()),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    def context(program: Program) -> Context:
        made = calibrated(0.0 if "budget" in sentence else 10.0)(program)
        return replace_fields(made, target="cuda" if "GPUs" in sentence else "cpu")

    check_refusal("sparse-attention", sentence, build, context=context)
