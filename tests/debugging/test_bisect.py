"""The search for a wrong operator: by halves, to the one that is wrong, or to the smallest part that is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.modules import Function
from thresher.backends.base import DEFAULT, Executable, LoweringOptions
from thresher.backends.eager import EagerBackend, EagerExecutable
from thresher.debugging import bisect
from thresher.debugging.bisect import Search, find_wrong_operator
from thresher.errors import BackendError
from thresher.frontend.capture import capture
from thresher.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Wrong(EagerBackend):
    """Adds one to the results of programs that have all of these calls; refuses those that have one of the others."""

    wrong: tuple[Any, ...] = ()
    refused: tuple[Any, ...] = ()
    lowered: list[int] = field(default_factory=list)

    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        calls = list(program.calls())
        self.lowered.append(len(calls))
        if any(n.target in self.refused for n in calls):
            raise BackendError("not this one")
        added = int(bool(self.wrong) and set(self.wrong) <= {n.target for n in calls})
        return Shifted(program, added)


class Shifted(EagerExecutable):
    def __init__(self, program: Program, added: int):
        super().__init__(program)
        self.added = added

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        return [v + self.added for v in super().run(inputs)]


def search(program: Program, backend: EagerBackend, clock: Callable[[], float] = lambda: 0.0) -> Search:
    return find_wrong_operator(program, backend, "cpu", DEFAULT, clock)


def found(program: Program, backend: EagerBackend) -> str:
    suspect = search(program, backend).suspect
    return "" if suspect is None else suspect.text


def long(x: Tensor) -> Tensor:
    for _ in range(50):
        x = x.sigmoid() * 1.5
    first, second = x.tanh().chunk(2, -1)
    return (first + second).erf().cos()


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Function(long), (torch.randn(3, 4),))


def test_nothing_wrong(program: Program) -> None:
    backend = Wrong()
    assert found(program, backend) == ""
    assert len(backend.lowered) <= 5  # parts, and not each call


def test_the_operator_is_named(program: Program) -> None:
    backend = Wrong((aten.erf.default,))
    assert found(program, backend).startswith("erf (aten.erf.default, module erf), error ")
    assert len(backend.lowered) < 20


def test_two_calls_that_are_wrong_together(program: Program) -> None:
    backend = Wrong((aten.erf.default, aten.cos.default))
    sentence = found(program, backend)
    assert sentence.startswith("erf to cos, lowered together but not alone, error ")


def test_what_cannot_be_lowered_alone_is_passed_over(program: Program) -> None:
    backend = Wrong((aten.cos.default,), refused=(aten.erf.default,))
    assert found(program, backend).startswith("cos (aten.cos.default")


def test_a_tie_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of two equal numbers is the first is anybody's guess."""
    monkeypatch.setattr(bisect, "PART", 1)
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0]])

    class Last(EagerBackend):
        def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
            executable = EagerExecutable(program)
            executable.run = lambda inputs: [3 - inputs[0].flip(-1).argmax(-1)]  # type: ignore[method-assign]
            return executable

    assert found(capture(Function(lambda x: x.argmax(-1)), (x,)), Last()) == ""
    clear = capture(Function(lambda x: x.argmax(-1)), (torch.tensor([[1.0, 4.0, 3.0, 2.0]]),))
    assert found(clear, Last()) == ""


def test_the_module_and_the_line_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    sentence = found(capture(model, (torch.randn(2, 4),)), Wrong((aten.gelu.default,)))
    assert "module 1" in sentence and "gelu" in sentence


def choosing(x: Tensor) -> Tensor:
    for _ in range(40):
        x = x * 1.01 + 0.1
    return x.topk(2).values


def test_parts_that_choose_come_first_and_of_several_results_the_call_is_named() -> None:
    backend = Wrong((aten.topk.default,))
    suspect = search(capture(Function(choosing), (torch.randn(3, 4),)), backend).suspect
    assert suspect is not None and suspect.node is not None and suspect.node.target is aten.topk.default
    assert suspect.text.startswith("topk (aten.topk.default, module topk), error ")
    assert backend.lowered[0] < bisect.PART  # the last part, which is the smaller one


def test_a_search_ends_in_time(program: Program) -> None:
    backend = Wrong((aten.cos.default,))
    assert search(program, backend, itertools.count(0, 40).__next__) == Search(
        None, "the search for it ended after 60 s, with 1 of 4 parts"
    )
    assert len(backend.lowered) == 1
