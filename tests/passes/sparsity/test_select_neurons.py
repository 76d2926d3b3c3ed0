"""A part of the neurons, chosen by the input: what is built is what is measured, and within the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from helpers.cases.contexts import calibrated
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher import Budget
from thresher.analysis.cost.cost import machine_model
from thresher.approximation.calibration import Calibration
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.passes import pipelines
from thresher.passes.sparsity._targets import targets_of
from thresher.passes.sparsity.select_neurons import SelectNeurons, chosen_neurons, edit, importance
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

SLOW = replace(machine_model("cpu"), flops=1e8, launch=0.0)  # on which even small products are worth saving
WIDTH, HIDDEN, BLOCK = 16, 64, 8


class Gated(nn.Module):
    """SwiGLU; which neurons are open is much the same for all rows of an input, and other ones for other inputs."""

    def __init__(self, bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias), nn.Linear(WIDTH, HIDDEN, bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias)
        with torch.no_grad():
            self.gate.weight *= 4

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def texts(count: int, rows: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(count, 1, 1, WIDTH, generator=generator)
    return list(topics + 0.1 * torch.randn(count, 1, rows, WIDTH, generator=generator))


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_built_is_what_is_measured(bias: bool) -> None:
    model, data = Gated(bias), texts(6)
    program = PassManager(pipelines.exact).run(capture(model.eval(), (data[0],)))
    (target,) = targets_of(program)[:1] if targets_of(program)[0].kind == "gate" else targets_of(program)[1:]
    rule, samples = SelectNeurons(block=BLOCK), [[x] for x in data]
    weights = importance(program, [target], samples)
    errors = rule.errors(program, [target], weights, samples)[target]
    work = program.clone()
    edit(work, target.value.name, weights[target], 4, BLOCK)
    work.clean().verify()
    off = norm = 0.0
    for x in data:
        (found,), (wanted,) = work.run(x), program.run(x)
        a = F.silu(model.gate(x)).detach()
        kept = chosen_neurons(a, weights[target], 4, BLOCK)
        by_hand = (a * model.up(x)).detach()[..., kept] @ model.down.weight.detach()[:, kept].T + (
            model.down.bias.detach() if bias else 0
        )
        assert not compare([by_hand], [found]).exceeds(1e-5)
        off, norm = (
            off + (found - wanted).square().sum(),
            norm + (wanted - (model.down.bias.detach() if bias else 0)).square().sum(),
        )
    assert errors[4] == pytest.approx(float(off / norm), rel=1e-3) and errors[2] > errors[4]
    compiled = thresher.compile(to_module(work), (data[0],), passes="none")
    assert not compare(work.run(data[0]), [compiled(data[0])]).exceeds(1e-5)


def test_within_the_budget() -> None:
    data = texts(40)
    program = PassManager(pipelines.exact).run(capture(Gated().eval(), (data[0],)))
    calibration = Calibration.of(program, data, Budget(rel_l2=0.75))
    manager = PassManager([SelectNeurons(block=BLOCK)])
    manager.run(program, Context(machine=SLOW, calibration=calibration))
    (note,) = manager.records[0].rewrites
    assert "of 64 neurons" in note.message and manager.ledger[0].held_out.bound <= 0.75


def test_odd_widths_are_refused() -> None:
    data = texts(8)
    program = PassManager(pipelines.exact).run(capture(Gated().eval(), (data[0],)))
    manager = PassManager([SelectNeurons(block=24)])
    manager.run(program, Context(machine=SLOW, calibration=Calibration.of(program, data, Budget(rel_l2=0.3))))
    assert "no four blocks of 24" in manager.records[0].refusals[0].message


BEFORE = """\
program model {
  %x = input : f32[8, 4]
  %gate = constant "gate" : f32[16, 4]
  %up = constant "up" : f32[16, 4]
  %down = constant "down" : f32[4, 16]
  %a = aten.linear.default(%x, %gate) : f32[8, 16]
  %b = aten.silu.default(%a) : f32[8, 16]
  %c = aten.linear.default(%x, %up) : f32[8, 16]
  %d = aten.mul.Tensor(%b, %c) : f32[8, 16]
  %y = aten.linear.default(%d, %down) : f32[8, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[8, 4]
  %gate = constant "gate" : f32[16, 4]
  %up = constant "up" : f32[16, 4]
  %b_weight = constant "b_weight" : f32[16]
  %b_block = constant "b_block" : i64[4]
  %b_down = constant "b_down" : f32[16, 4]
  %a = aten.linear.default(%x, %gate) : f32[8, 16]
  %b = aten.silu.default(%a) : f32[8, 16]
  %reshape = aten.reshape.default(%b, [8, 16]) : f32[8, 16]
  %abs = aten.abs.default(%reshape) : f32[8, 16]
  %mean = aten.mean.dim(%abs, [0]) : f32[16]
  %mul = aten.mul.Tensor(%mean, %b_weight) : f32[16]
  %reshape_1 = aten.reshape.default(%mul, [4, 4]) : f32[4, 4]
  %sum_dim_int_list = aten.sum.dim_IntList(%reshape_1, [-1]) : f32[4]
  %topk = aten.topk.default(%sum_dim_int_list, 1) : (f32[1], i64[1])
  %getitem = getitem(%topk, 1) : i64[1]
  %unsqueeze = aten.unsqueeze.default(%getitem, 1) : i64[1, 1]
  %mul_1 = aten.mul.Tensor(%unsqueeze, 4) : i64[1, 1]
  %add = aten.add.Tensor(%mul_1, %b_block) : i64[1, 4]
  %reshape_2 = aten.reshape.default(%add, [4]) : i64[4]
  %reshape_3 = aten.reshape.default(%x, [8, 4]) : f32[8, 4]
  %index_select = aten.index_select.default(%up, 0, %reshape_2) : f32[4, 4]
  %permute = aten.permute.default(%index_select, [1, 0]) : f32[4, 4]
  %matmul = aten.matmul.default(%reshape_3, %permute) : f32[8, 4]
  %index_select_1 = aten.index_select.default(%reshape, 1, %reshape_2) : f32[8, 4]
  %mul_2 = aten.mul.Tensor(%index_select_1, %matmul) : f32[8, 4]
  %index_select_2 = aten.index_select.default(%b_down, 0, %reshape_2) : f32[4, 4]
  %matmul_1 = aten.matmul.default(%mul_2, %index_select_2) : f32[8, 4]
  %reshape_4 = aten.reshape.default(%matmul_1, [8, 4]) : f32[8, 4]
  return [%reshape_4]
}
"""


def test_before_and_after() -> None:
    check_rewrite("select-neurons{block=4}", BEFORE, AFTER, context=calibrated(10.0))


def two_readers() -> tuple:
    """Two layers read the product that the gate closes."""
    net = Gated()
    down = nn.Linear(HIDDEN, WIDTH)
    return Function(lambda x, s, d: (s.down(h := F.silu(s.gate(x)) * s.up(x)), d(h)), net, down), texts(1)[0]


REFUSALS = [
    ("all of its neurons are used: *", two_readers),
    ("several layers read them", two_readers),
    ("* are no four blocks of *, or not whole ones: another block= may fit", lambda: (Gated(), texts(1)[0])),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    item = f"select-neurons{{block={24 if 'blocks' in sentence else 8}}}"
    check_refusal(item, sentence, build, pipelines.canonicalize, calibrated(10.0))
