"""Small activations become 0: which are found, what is built is what is measured, and the budget holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
import thresher.ops
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher import Budget
from thresher.analysis.cost.break_even import BreakEven
from thresher.approximation.calibration import Calibration
from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.sparsity._targets import targets_of
from thresher.passes.sparsity.threshold_activations import (
    ThresholdActivations,
    ThresholdRule,
    effects,
    insert,
    thresholds,
)
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

ops = torch.ops.thresher
WIDTH, HIDDEN = 32, 128


class Block(nn.Module):
    """Two projections of one input, and a gated layer (SwiGLU)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        with torch.no_grad():
            self.gate.weight *= 6

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q(x) * self.k(x)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def samples(count: int, rows: int = 1) -> list[Tensor]:
    """A few channels are large, most are small."""
    scale = torch.logspace(1, -2, WIDTH)
    return list(torch.randn(count, rows, WIDTH, generator=torch.Generator().manual_seed(0)) * scale)


def free(layer) -> BreakEven:
    return BreakEven(1.0, (0.01, 1.0), (0.01, 1.0))


def program_of(model: nn.Module, x: Tensor) -> Program:
    return PassManager(pipelines.exact).run(capture(model.eval(), (x,)))


def test_what_can_be_thresholded() -> None:
    program = program_of(Block(), samples(1)[0])
    found = [(t.kind, len(t.readers), len(t.linears), len(t.measured)) for t in targets_of(program)]
    # the input of q and k (whose product is no gated layer: the gate is read by the product alone, behind no linear layer)
    assert ("gate", 1, 2, 1) in found  # silu: saves in up and down
    assert ("input", 2, 2, 2) in found  # of gate and up


@pytest.mark.parametrize("kind", ["number", "channel", "top-k"])
def test_what_is_built_is_what_is_measured(kind: str) -> None:
    """The error behind the layers that read the value, and how much is left."""
    model, data = Block(), samples(8, rows=2)
    program = program_of(model, data[0])
    (target,) = [t for t in targets_of(program) if t.kind == "gate"]
    choices = thresholds(program, [target], [[x] for x in data], [kind], [0.5])
    (choice,) = choices[target]
    error, part = effects(program, [target], choices, [[x] for x in data])[target][choice]
    work = program.clone()
    insert(work, next(t for t in targets_of(work) if t.kind == "gate"), choice)
    work.clean().verify()
    down = next(n for n in program.calls(torch.ops.aten.linear.default) if n is target.measured[0])
    off = norm = left = listed = 0.0
    for x in data:
        seen: dict = {}
        changed: dict = {}
        program.run(x, watch=lambda n, v, seen=seen: seen.__setitem__(n.name, v))
        work.run(x, watch=lambda n, v, changed=changed: changed.__setitem__(n.name, v))
        weight = program.constant(down.args[1])
        before, after = (values[down.args[0].name] @ weight.T for values in (seen, changed))
        off, norm = off + (after - before).square().sum(), norm + before.square().sum()
        gate = next(v for n, v in changed.items() if n.startswith("shrink"))
        left += float((gate != 0).float().mean()) / len(data)
        listed += float((gate != 0).any(0).float().mean()) / len(data)
    assert error == pytest.approx(float(off / norm), rel=1e-3) and part == pytest.approx(listed)
    assert left == pytest.approx(0.5, abs=0.02)
    compiled = thresher.compile(to_module(work), (data[0],), passes="none")
    assert not compare(work.run(data[0]), [compiled(data[0])]).exceeds(1e-5)


def test_channels_by_what_they_are_multiplied_with() -> None:
    """At the same density a threshold per channel loses less, where columns of the weight differ."""
    model, data = nn.Sequential(nn.Linear(WIDTH, WIDTH)), samples(16)
    with torch.no_grad():
        model[0].weight *= torch.logspace(-1.5, 1, WIDTH)
    program = program_of(model, data[0])
    found = targets_of(program)
    choices = thresholds(program, found, [[x] for x in data], ["number", "channel"], [0.5])
    of = {c.kind: e for c, (e, _) in effects(program, found, choices, [[x] for x in data])[found[0]].items()}
    assert of["channel"] < 0.5 * of["number"]


def test_within_the_budget() -> None:
    model, data = Block(), samples(40)
    program = program_of(model, data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.05))
    manager = PassManager([ThresholdActivations()])
    result = manager.run(program, Context(calibration=calibration, find_break_even=free))
    assert {n.message.split(":")[0] for n in manager.records[0].rewrites} >= {"gate"}
    assert manager.ledger[0].held_out.bound <= 0.05
    compiled = thresher.compile(to_module(result), (data[0],), passes="none")
    assert not compare(result.run(data[1]), [compiled(data[1])]).exceeds(1e-5)


def test_one_density_for_all() -> None:
    """CATS as published: half of every gate."""
    model, data = Block(), samples(40)
    program = program_of(model, data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.5))
    manager = PassManager([ThresholdActivations(density=0.5, kinds="number", where="gate")])
    manager.run(program, Context(calibration=calibration, find_break_even=free))
    assert [n.message for n in manager.records[0].rewrites] == ["gate: 50 % stay"]


def test_many_rows_share_no_zeros() -> None:
    data = samples(8, rows=64)
    program = program_of(Block(), data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.5))
    manager = PassManager([ThresholdActivations()])
    slow = BreakEven(1.0, (1.0, 1.5), (0.01, 1.0))
    manager.run(program, Context(calibration=calibration, find_break_even=lambda layer: slow))
    assert any("too many rows" in n.message for n in manager.records[0].refusals)


def test_unknown_kinds() -> None:
    with pytest.raises(PassError, match="some of number, channel, top-k, joined by plus signs, not 'best'"):
        ThresholdActivations(kinds="best")
    assert str(ThresholdRule("top-k", 0.5, None, 7)) == "the 7 largest stay"


BEFORE = """\
program model {
  %x = input : f32[1, 4]
  %gate = constant "gate" : f32[16, 4]
  %up = constant "up" : f32[16, 4]
  %down = constant "down" : f32[4, 16]
  %a = aten.linear.default(%x, %gate) : f32[1, 16]
  %b = aten.silu.default(%a) : f32[1, 16]
  %c = aten.linear.default(%x, %up) : f32[1, 16]
  %d = aten.mul.Tensor(%b, %c) : f32[1, 16]
  %y = aten.linear.default(%d, %down) : f32[1, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[1, 4]
  %gate = constant "gate" : f32[16, 4]
  %up = constant "up" : f32[16, 4]
  %down = constant "down" : f32[4, 16]
  %b_t = constant "b_t" : f32[]
  %a = aten.linear.default(%x, %gate) : f32[1, 16]
  %b = aten.silu.default(%a) : f32[1, 16]
  %c = aten.linear.default(%x, %up) : f32[1, 16]
  %shrink = thresher.shrink.default(%b, %b_t, 'hard', 'nle') : f32[1, 16]
  %d = aten.mul.Tensor(%shrink, %c) : f32[1, 16]
  %y = aten.linear.default(%d, %down) : f32[1, 4]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("threshold-activations{density=0.5,kinds=number,where=gate}", BEFORE, AFTER, context=calibrated(10.0))


def slow(program: Program) -> Context:
    """Skipping zeros takes longer than what it saves."""
    return replace(calibrated(10.0)(program), find_break_even=lambda layer: BreakEven(1.0, (1.0, 1.5), (0.01, 1.0)))


REFUSALS = [("zeros here would save nothing: too many rows share a list", lambda: (Block(), samples(1, rows=64)[0]))]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("threshold-activations", sentence, build, context=slow)
