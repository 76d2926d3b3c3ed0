"""The survey of real models: what it tries, what it leaves out and why, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from thresher.models.families import LIBRARIES, Library
from thresher.models.families.sample import SampleExcluded
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.testing import Case, Zoo, examine, prove

aten = torch.ops.aten
SAMPLE = Zoo(("reference/lista", "reference/bert", "transformers/albert"))


@dataclass(frozen=True)
class DropGelu(Pass):
    """Replace each gelu by a relu, which is wrong."""

    name: ClassVar[str] = "drop-gelu"
    target_ops: ClassVar[tuple] = (aten.gelu.default,)

    def apply(self, program, context: Context) -> PassResult:
        work, rewrites = program.clone(), []
        for node in list(work.calls(aten.gelu.default)):
            node.replace_all_uses_with(work.insert_call(node, aten.relu.default, (node.args[0],), like=node))
            rewrites.append(Note.at(node, "a relu"))
        return PassResult(work.clean(), rewrites)


@dataclass(frozen=True)
class Nothing(Pass):
    """Rewrite nothing."""

    name: ClassVar[str] = "nothing"

    def apply(self, program, context: Context) -> PassResult:
        return PassResult(program)


@dataclass(frozen=True)
class DropNegations(Pass):
    """Remove two negations in a row."""

    name: ClassVar[str] = "drop-negations"

    def apply(self, program, context: Context) -> PassResult:
        work, rewrites = program.clone(), []
        for node in list(work.calls(aten.neg.default)):
            if node.args[0].target is aten.neg.default:
                node.replace_all_uses_with(node.args[0].args[0])
                rewrites.append(Note.at(node, "two negations"))
        return PassResult(work.clean(), rewrites) if rewrites else PassResult(program)


def test_an_exact_pass_on_a_sample() -> None:
    survey = prove("simplify", zoo=SAMPLE)
    assert survey is not None and survey.rewritten == ["reference/bert", "transformers/albert"]
    assert survey.tried["reference/lista"] == 0 and not survey.left_out
    assert str(survey).startswith("tried on 3 models, rewrote something on 2; 0 have none of its operators, 0 left out")


def test_a_wrong_pass_is_found_on_a_model() -> None:
    findings = examine(DropGelu(), zoo=Zoo(("reference/bert", "reference/lista")))
    assert [f.where for f in findings if f.check == "exact"] == ["reference/bert"]
    assert findings.survey is not None and findings.survey.without == ["reference/lista"]
    with pytest.raises(AssertionError, match="exact: reference/bert: on the example: relative error"):
        prove(DropGelu(), zoo=Zoo(("reference/bert",)))


def test_a_model_that_is_left_alone_is_no_finding() -> None:
    survey = prove(Nothing(), zoo=Zoo(("reference/lista",)))
    assert survey is not None and survey.tried == {"reference/lista": 0} and not survey.rewritten


def test_what_is_too_large_or_too_late_is_left_out_by_name() -> None:
    for limit, reason in (
        ({"most_parameters": 10}, "more than 10 parameters"),
        ({"most_calls": 3}, "more than 3 calls"),
        ({"most_flops": 100}, "more than 100 floating-point operations"),
        ({"seconds": -1.0}, "the -1 seconds were over"),
    ):
        survey = prove(Nothing(), zoo=Zoo(("reference/lista",), **limit))
        assert survey is not None and survey.left_out == {"reference/lista": reason} and not survey.tried


def test_a_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def names():
        raise AssertionError("asked for")

    monkeypatch.setitem(LIBRARIES, "timm", Library(names, lambda name: None, ("a_library_that_nobody_has",)))
    survey = prove(Nothing(), zoo=Zoo(("timm/*", "reference/lista")))
    assert survey is not None and survey.left_out == {"timm/*": "a_library_that_nobody_has not installed"}
    assert "left out: timm/*: a_library_that_nobody_has not installed" in str(survey)


def test_a_model_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name):
        raise SampleExcluded("no tensors") if name == "one" else RuntimeError("sizes differ\nat length")

    monkeypatch.setitem(LIBRARIES, "timm", Library(lambda: iter(["one", "two"]), build, ()))
    survey = prove(Nothing(), zoo=Zoo(("timm/*",)))
    assert survey is not None
    assert survey.left_out == {"timm/one": "no tensors", "timm/two": "RuntimeError: sizes differ"}


def test_a_name_that_no_model_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="no model has a name like timm-convnext; names look like timm/convnext"):
        prove(Nothing(), zoo=Zoo(("timm-convnext",)))


class Copied(nn.Module):
    """A scale that is read as it is and, through a hyperbolic tangent, as a constant of its own; and two negations."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.neg().neg() * self.scale.tanh() + self.scale


def test_copies_that_an_earlier_pass_keeps_are_not_those_of_the_pass() -> None:
    case = Case("copies", lambda n: (Copied(), (torch.randn(n, 4),)), n=(2,))
    assert not DropNegations.keeps_copies
    prove(DropNegations(), case, first=["evaluate-constants"], misses=0, dtypes=())
