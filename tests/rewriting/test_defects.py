"""What authors get wrong, said in their words: in the report of a build, and by the proof kit."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import thresher
from thresher.errors import PassError
from thresher.passes import pipelines
from thresher.rewriting import registry
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.manager import PassManager
from thresher.testing import Case, examine

MODEL, X = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), torch.randn(2, 3)
CASE = Case("mlp", lambda: (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (torch.randn(2, 3),)))


@dataclass(frozen=True)
class Faulty(Pass):
    """Returns what ``result`` makes of the program."""

    name: ClassVar[str] = "faulty"
    result: Callable[[Any], Any] | None = None

    def apply(self, program: Any, context: Context) -> Any:
        return self.result(program)  # the line that is named


RETURNED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a program": (lambda p: p.clone(), r"returned a Program; return PassResult\(work.clean\(\), \[Note.at"),
    "nothing": (lambda p: None, "returned nothing; return PassResult"),
    "no program": (lambda p: PassResult(None, []), "has nothing in the place of its program"),
    "strings": (
        lambda p: PassResult(p, ["folded"]),
        r"among the rewrites .* is 'folded'; write Note.at\(node, 'folded'\)",
    ),
    "refused by strings": (lambda p: PassResult(p, [], ["no"]), r"among the refusals .* write Note.at\(node, 'no'\)"),
    "one note": (lambda p: PassResult(p, "folded"), "the rewrites .* are a str; they are a list of notes"),
    "an exception": (lambda p: p.constants["weight"], rf"KeyError: 'weight' \({__file__}:\d+\)"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_pass_returns_is_checked_at_once(name: str) -> None:
    result, message = RETURNED[name]
    manager = PassManager([Faulty(result)], "off")
    manager.run(thresher.capture(MODEL, (X,)), Context())
    (record,) = manager.records
    assert record.status == "reverted"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(record.failure)
    raised = next(f for f in examine(Faulty(result), CASE) if f.check == "raises")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(raised.message)


@pytest.mark.parametrize("passes", [[Faulty], Faulty])
def test_a_class_is_no_pass(passes: Any) -> None:
    with pytest.raises(PassError, match=r"Faulty is a class, .*: write Faulty\(\)"):
        thresher.rewrite(MODEL, (X,), passes=passes)
    with pytest.raises(PassError, match=r"write Faulty\(\)"):
        examine(Faulty, CASE)
    with pytest.raises(PassError, match="an instance of Pass, or a name, and not 3"):
        thresher.rewrite(MODEL, (X,), passes=[3])


def test_a_single_instance_is_a_list_of_one() -> None:
    assert pipelines.resolve(Faulty()) == [Faulty()]


@pytest.mark.parametrize(
    ("name", "near"), [("fold-chanels", "fold-channels"), ("exacct", "exact"), ("canonicalise", "canonicalize")]
)
def test_an_unknown_name_has_a_suggestion(name: str, near: str) -> None:
    listed = r"pipelines: exact, canonicalize, approximate, none; known passes: canonicalize-attention, "
    with pytest.raises(PassError, match=rf"unknown pass '{name}'; did you mean '{near}'\? {listed}"):
        thresher.rewrite(MODEL, (X,), passes=["exact", name])
    with pytest.raises(PassError, match="unknown pass 'qqqq'; pipelines: exact"):
        thresher.rewrite(MODEL, (X,), passes="qqqq")


def test_pipelines_may_come_first() -> None:
    def build(n: int) -> tuple[nn.Module, tuple]:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), (torch.randn(n, 3, 5, 5),)

    assert examine("fold-batch-norm", Case("norm", build, n=(1, 2)), first=["canonicalize"], dtypes=(), misses=5) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Case("c", lambda batch: None, batch=2), r"case 'c': the values of batch .* not 2: batch=\(2,\)"),
        (lambda: Case("c", lambda mode: None, mode="same"), r"not 'same': mode=\('same',\)"),
        (lambda: Case("c", lambda n: None, n=()), r"not \(\)"),
        (lambda: Case("c", lambda n: None, refused={"m": (1,)}, n=(1,)), "refuses values of m, which is no size of it"),
    ],
)
def test_sizes_of_a_case(make: Callable[[], Case], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (nn.ReLU(), r"case 'c': the builder returns \(module, inputs\), .* it returned a ReLU"),
        ((nn.ReLU(),), "it returned a tuple"),
        ((nn.ReLU(), X), r"its second value is a Tensor: write \(x,\) for one input"),
        ((torch.relu, (X,)), "its first value is a builtin_function_or_method"),
    ],
)
def test_what_a_builder_returns(built: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        examine("simplify", Case("c", lambda: built))


def test_a_broken_entry_point_is_a_warning_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error for whoever asks for just that pass; the passes of other packages are there."""
    real = importlib.metadata.entry_points(group=registry.GROUP)
    broken = importlib.metadata.EntryPoint("broken-pass", "no_such_module:Broken", registry.GROUP)
    several = importlib.metadata.EntryPoints([*real, broken])
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: several)
    with pytest.warns(
        UserWarning, match=r"the pass 'broken-pass' .*\(no_such_module:Broken\) cannot be loaded: Module"
    ):
        names = registry.registered_passes()
    assert "fold-channels" in names and "broken-pass" not in names
    with pytest.raises(PassError, match="the pass 'broken-pass' of some package"):
        thresher.rewrite(MODEL, (X,), passes=["broken-pass"])


def test_an_entry_point_has_the_name_of_its_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "thresher.passes.fold.fold_scale:FoldScale"
    other = importlib.metadata.EntryPoint("scale-folder", value, registry.GROUP)
    several = importlib.metadata.EntryPoints([*importlib.metadata.entry_points(group=registry.GROUP), other])
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: several)
    cure = f"the entry point 'scale-folder' of some package is the pass 'fold-scale': write fold-scale = \"{value}\""
    with pytest.raises(PassError, match=re.escape(cure)):
        thresher.rewrite(MODEL, (X,), passes=["scale-folder"])
    with pytest.warns(UserWarning, match="the entry point 'scale-folder'"):
        assert "fold-scale" in registry.registered_passes()


def test_notes_that_are_right_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(program: Any) -> PassResult:
        node = next(program.calls())
        return PassResult(program, [], [Note.at(node, "not here")])

    manager = PassManager([Faulty(noted)], "off")
    manager.run(thresher.capture(MODEL, (X,)), Context())
    assert manager.records[0].status == "unchanged" and manager.records[0].refusals[0].message == "not here"
