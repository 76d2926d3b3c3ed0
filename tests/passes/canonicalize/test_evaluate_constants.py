"""Calls on constants alone are evaluated; random numbers are not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers.canonical import canonical
from helpers.modules import Function
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.program import Role
from thresher.rewriting.manager import PassManager

aten = torch.ops.aten


def test_masks_parametrizations_and_grids_are_evaluated() -> None:
    torch.manual_seed(0)
    masked = nn.Linear(6, 6)
    prune.l1_unstructured(masked, "weight", 0.5)
    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    model = Function(lambda x, a, b: b(a(x)) * torch.arange(6) + torch.ones(6).cumsum(0), masked, normed)
    program, _ = canonical(model, torch.randn(2, 6))
    assert [n.target for n in program.calls()] == [
        aten.linear.default,
        aten.linear.default,
        aten.mul.Tensor,
        aten.add.Tensor,
    ]


def test_a_mask_used_often_becomes_one_constant() -> None:
    layer = nn.Linear(6, 6, bias=False)
    prune.l1_unstructured(layer, "weight", 0.5)
    program, _ = canonical(Function(lambda x, a: a(a(a(x).relu()).relu()), layer), torch.randn(2, 6))
    assert len(program.constants) == 1


def test_one_note_and_one_step_back_for_each_constant_that_stays() -> None:
    """Not for those on the way to it."""
    model = Function(lambda x, a: F.linear(x, (a.weight * 2).cos().t()), nn.Linear(4, 4))
    manager = PassManager(["evaluate-constants"], "each")
    program = manager.run(capture(model.eval(), (torch.randn(2, 4),)))
    assert len(manager.records[0].rewrites) == len(program.lineage) == 1


def test_random_numbers_are_not_constants() -> None:
    """A model that draws them is not captured; a pass may still meet the operator."""
    program = capture(Function(lambda x: x + 2), (torch.randn(3),))
    (node,) = program.calls()
    node.update_arg(1, program.insert_call(node, torch.ops.aten.rand.default, ([3],), like=node))
    result = PassManager(["evaluate-constants"], "off").run(program)
    assert any("rand" in str(n.target) for n in result.calls())


def evaluated(item: str, model: nn.Module, *args: torch.Tensor) -> list:
    """Return the operators that are left after the pass."""
    result = PassManager([item], "each").run(capture(model.eval(), args))
    return [n.target for n in result.calls()]


def test_a_result_may_be_as_large_as_the_limit_or_as_its_constants() -> None:
    row, x = nn.Parameter(torch.randn(4)), torch.randn(4, 4)
    wide = Function(lambda x, rows: x + rows[0][:, None] * rows[0], nn.ParameterList([row]))
    assert evaluated("evaluate-constants{limit=16}", wide, x) == [aten.add.Tensor]
    assert evaluated("evaluate-constants{limit=15}", wide, x) == [aten.mul.Tensor, aten.add.Tensor]
    pair = Function(lambda x, rows: x + torch.cat([rows[0], rows[1]]), nn.ParameterList([row, row * 2]))
    assert evaluated("evaluate-constants{limit=0}", pair, torch.randn(8)) == [aten.add.Tensor]


def test_what_is_computed_of_parameters_is_trained() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.register_buffer("mask", torch.eye(4))
    model = Function(lambda x, a: F.linear(x, a.weight * a.mask) + (a.mask * 2).sum(0), layer)
    program = PassManager(["evaluate-constants"], "each").run(capture(model.eval(), (torch.randn(2, 4),)))
    (linear,) = program.calls(aten.linear.default)
    trained = linear.args[1].target
    assert {name: program.role(name) for name in program.constants} == {
        name: Role.PARAMETER if name == trained else Role.BUFFER for name in program.constants
    }
    assert len(program.constants) == 2


def test_a_buffer_is_expanded() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.register_buffer("row", torch.randn(1, 4))
    learned = Function(lambda x, a: x * a.weight[:1].expand(3, 4), layer)
    assert evaluated("evaluate-constants", learned, torch.randn(3, 4)) == [aten.expand.default, aten.mul.Tensor]
    fixed = Function(lambda x, a: x * a.row.expand(3, 4), layer)
    assert evaluated("evaluate-constants", fixed, torch.randn(3, 4)) == [aten.mul.Tensor]


def test_a_constant_that_is_reached_in_many_ways() -> None:
    """Each step reads the one before twice: 2^40 ways lead back from the mask of the weight."""

    def forward(x: torch.Tensor, a: nn.Module) -> torch.Tensor:
        mask = a.mask
        for _ in range(40):
            mask = (mask + mask) / 2
        return F.linear(x, a.weight * mask)

    layer = nn.Linear(4, 4, bias=False)
    layer.register_buffer("mask", torch.eye(4))
    assert evaluated("evaluate-constants", Function(forward, layer), torch.randn(2, 4)) == [aten.linear.default]


BEFORE = """\
program model {
  %x = input : f32[2, 3]
  %weight = constant "weight" : f32[4, 3]
  %mask = constant "mask" : f32[4, 3]
  %masked = aten.mul.Tensor(%weight, %mask) : f32[4, 3]
  %y = aten.linear.default(%x, %masked, None) : f32[2, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 3]
  %masked_1 = constant "masked" : f32[4, 3]
  %y = aten.linear.default(%x, %masked_1, None) : f32[2, 4]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("evaluate-constants", BEFORE, AFTER)
