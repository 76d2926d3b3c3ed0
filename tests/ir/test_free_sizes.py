"""Free sizes: what would fix one is an error that names it; what holds for the example only is none of a call's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx
from torch.export import Dim

from helpers.modules import Function
from thresher.authoring import Context, Note, Pass, PassManager, PassResult
from thresher.errors import ProgramError
from thresher.frontend.capture import capture
from thresher.ir.free_results import ExampleOnly
from thresher.ir.free_sizes import at_other_sizes, free_sizes, sizes_kept_free
from thresher.ir.nodes import Shape, same_size, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    """Two free sizes that are both 6 in the example."""
    shapes = ({0: Dim("n", min=2, max=64), 1: Dim("m", min=2)},)
    return capture(Function(lambda x: x.relu()), (torch.randn(6, 6),), dynamic_shapes=(shapes,))


@dataclass(frozen=True)
class Asks(Pass):
    """Asks for a size, and rewrites."""

    name: ClassVar[str] = "asks"
    question: Callable[[Any, Any], Any] = lambda n, m: n

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        (node,) = work.calls(aten.relu.default)
        self.question(*shape_of(node))
        node.replace_all_uses_with(work.insert_call(node, aten.clamp_min.default, (node.args[0], 0), like=node))
        return PassResult(work.clean(), [Note.at(node, "rewritten")])


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (lambda n, m: int(n), "6"),
        (lambda n, m: n == 6, "Eq"),
        (lambda n, m: bool(n == m), "Eq"),
        (lambda n, m: [n] != [6], "Eq|Ne"),
        (lambda n, m: n > 5 and None, "> 5"),
        (lambda n, m: list(range(m)), "6"),
    ],
)
def test_a_pass_that_asks_for_a_size_is_refused_by_name(program: Program, question: Callable, words: str) -> None:
    sizes = free_sizes(program)
    manager = PassManager([Asks(lambda n, m: bool(question(n, m)))])
    assert manager.run(program) is program
    (record,) = manager.records
    assert record.status == "reverted"
    assert "which would fix a free size of " in record.failure and "inputs_0 [" in record.failure
    assert free_sizes(program) == sizes and not program.fake_mode.shape_env.guards


def test_what_holds_for_all_sizes_may_be_asked(program: Program) -> None:
    manager = PassManager(
        [Asks(lambda n, m: (n >= 2, n <= 64, n == n, n + m == m + n, same_size(n, 6), same_size(n, m)))]
    )
    assert manager.run(program) is not program and manager.records[0].status == "changed"


def test_shapes_are_equal_where_they_are_for_all_sizes(program: Program) -> None:
    relu = next(program.calls())
    shape, (n, m) = shape_of(relu), shape_of(relu)
    assert isinstance(shape, Shape) and shape == shape_of(program.placeholders[0]) and shape[:1] == (n,)
    with sizes_kept_free(program):
        assert shape != (6, 6) and shape != (n, 6) and shape != (m, n) and shape != (6, 6)
        assert shape != (n,) and shape != [n, m] and isinstance(shape[1:], Shape)


def test_outside_of_a_program_with_free_sizes_nothing_is_forbidden() -> None:
    fixed = capture(Function(lambda x: x.relu()), (torch.randn(6, 6),))
    with sizes_kept_free(fixed):
        assert shape_of(next(fixed.calls())) == (6, 6)
    assert free_sizes(fixed) == {} and list(at_other_sizes(fixed, fixed.probe)) == []


def test_the_error_is_our_own(program: Program) -> None:
    message = r"it asks for .* which would fix a free size of inputs_0 \[\w+, \w+\]"
    with pytest.raises(ProgramError, match=message), sizes_kept_free(program):
        int(shape_of(next(program.calls()))[0])


def added(program: Program, value: Tensor) -> fx.Node:
    (node,) = program.calls(aten.relu.default)
    return program.insert_call(node.next, aten.add.Tensor, (node, program.add_constant(value, "map", like=node)))


def test_a_constant_of_the_example_fits_no_other_size(program: Program) -> None:
    """It is as large as the value in the example, and only there."""
    with pytest.raises(ExampleOnly, match=r"aten\.add\.Tensor fits the sizes of the example only"):
        added(program.clone(), torch.randn(6, 6))
    assert shape_of(added(program.clone(), torch.randn(1, 1))) == shape_of(program.placeholders[0])
    assert not program.fake_mode.shape_env.guards


def test_sizes_that_are_equal_in_the_example_are_not_taken_for_each_other(program: Program) -> None:
    (node,) = program.calls(aten.relu.default)
    turned = program.insert_call(node.next, aten.permute.default, (node, [1, 0]))
    with pytest.raises(ExampleOnly):
        program.insert_call(turned.next, aten.add.Tensor, (node, turned))


def test_a_call_is_run_once_for_a_kind(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = program.calls(aten.relu.default)
    first = program.insert_call(node.next, aten.neg.default, (node,))
    monkeypatch.setattr("thresher.ir.fake_results.for_free_sizes", lambda *args: pytest.fail("run again"))
    second = program.insert_call(node.next, aten.neg.default, (node,))
    assert second.meta["val"] is first.meta["val"]


def test_other_sizes_are_within_their_bounds_all_different_or_alike_as_in_the_example(program: Program) -> None:
    others = list(at_other_sizes(program, program.probe))
    assert len(others) > 6
    for (x,) in others:
        assert 2 <= x.shape[0] <= 64 and x.shape[1] >= 2 and x.shape[0] != 6
    assert [x.shape[0] == x.shape[1] for (x,) in others[:4]] == [False, True, False, True]
