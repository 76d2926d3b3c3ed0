"""Residual branches: found, measured, removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.cases.contexts import calibrated
from helpers.rewrites import check_rewrite
from thresher import Budget
from thresher.approximation.calibration import Calibration
from thresher.approximation.search import Candidate
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.models.vit import ViT
from thresher.passes import pipelines
from thresher.passes.layers.drop_sublayers import DropSublayers, branches
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare


def vit(weak: int | None = None) -> ViT:
    torch.manual_seed(0)
    model = ViT(size=16, patch=4, dim=32, depth=4, heads=2, classes=5).eval()
    if weak is not None:
        with torch.no_grad():
            model.blocks[weak].mlp[2].weight *= 1e-3
            model.blocks[weak].mlp[2].bias *= 1e-3
    return model


def images(count: int) -> list[Tensor]:
    return list(torch.randn(count, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))


def passed(model: nn.Module, budget: Budget, rule: DropSublayers) -> tuple[Program, PassManager, Program]:
    data = images(12)
    program = PassManager(pipelines.exact).run(capture(model, (data[0],)))
    manager = PassManager([rule])
    return manager.run(program, Context(calibration=Calibration.of(program, data, budget))), manager, program


def test_the_branches_of_a_vit() -> None:
    found = branches(PassManager(pipelines.exact).run(capture(vit(), (images(1)[0],))))
    assert [b.module.split(".")[-1] for b in found] == ["proj", "2"] * 4


def test_a_branch_that_does_little_goes_alone() -> None:
    model = vit(weak=2)
    small, manager, _ = passed(model, Budget(rel_l2=0.005), DropSublayers())
    assert [n.module for n in manager.records[0].rewrites] == ["blocks.2.mlp.2"]
    x = images(1)[0]
    model.blocks[2].mlp = nn.Module()
    model.blocks[2].mlp.forward = lambda y: torch.zeros_like(y)
    with torch.no_grad():
        assert not compare([model(x)], small.run(x)).exceeds(1e-5)


def test_evenly_spread_for_a_speed_or_not_at_all() -> None:
    _, manager, _ = passed(vit(), Budget(rel_l2=10.0), DropSublayers(speed=1.3))
    (note,) = manager.records[0].rewrites
    assert "branches removed" in note.message
    _, manager, _ = passed(vit(), Budget(rel_l2=1e-4), DropSublayers(speed=1.3))
    assert manager.records[0].status == "unchanged"


def test_all_branches_can_go() -> None:
    program = PassManager(pipelines.exact).run(capture(vit(), (images(1)[0],)))
    found = branches(program)
    everything = Candidate("", "", "", 0.0, 0.0, payload=tuple(b.sum.name for b in found))
    small = DropSublayers().build(program, [everything])
    assert branches(small) == [] and not list(small.calls(torch.ops.aten.gelu.default))


def test_a_branch_that_others_read_stays() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x)
            return x + y, y.sum()  # type: ignore[return-value]

    assert branches(capture(Read(), (torch.randn(2, 3, 8),))) == []


BEFORE = """\
program model {
  %x = input : f32[2, 3, 4]
  %weight = constant "weight" : f32[4, 4]
  %bias = constant "bias" : f32[4]
  %branch = aten.linear.default(%x, %weight, %bias) : f32[2, 3, 4]
  %sum = aten.add.Tensor(%x, %branch) : f32[2, 3, 4]
  %y = aten.relu.default(%sum) : f32[2, 3, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 3, 4]
  %y = aten.relu.default(%x) : f32[2, 3, 4]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("drop-sublayers", BEFORE, AFTER, context=calibrated(10.0))
