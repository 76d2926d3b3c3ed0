"""Validation: rounding is excused where it is rounding, random inputs fit, and what cannot be compared is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import thresher
from helpers.modules import Amplifier, Function
from thresher.authoring import Context, Note, Pass, PassResult
from thresher.backends.base import DEFAULT, Executable, LoweringOptions
from thresher.backends.eager import EagerBackend, EagerExecutable
from thresher.errors import ValidationError
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.report.report import Report
from thresher.runtime.comparison import Check
from thresher.runtime.reference_run import ReferenceRun

aten = torch.ops.aten


class Precise(EagerExecutable):
    """Rounds once, at the end, as no sum of floats does: chaotic models come out differently."""

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        wide = self.program.run(*inputs, dtype=torch.float64)
        return [v.to(dtype_of(n)) if is_tensor(n) else v for v, n in zip(wide, self.program.output_nodes)]


@dataclass(frozen=True)
class Other(EagerBackend):
    """Torch in float64, with a defect where one is planted: ``plant(program, call)`` changes the results of calls of ``target``."""

    target: Any = None
    plant: Callable[[Program, fx.Node], fx.Node] | None = None

    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        work = program.clone()
        wrong = [n for n in work.calls(self.target) if n.name not in lowering_options.library_nodes]
        for node in wrong if self.plant else ():
            users = list(node.users)
            for user in users:
                user.replace_input_with(node, self.plant(work, node))
        return Precise(work)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., thresher.Compiled]:
    """``compile()`` with another backend than is registered."""

    def compile_with(backend: EagerBackend, model: nn.Module, args: tuple, **options: Any) -> thresher.Compiled:
        monkeypatch.setattr("thresher.driver.session.find_backend", lambda name: backend)
        return thresher.compile(model, args, target="cpu", **{"tune": "never", "passes": "none", **options})

    return compile_with


def times(factor: float) -> Callable[[Program, fx.Node], fx.Node]:
    def plant(program: Program, node: fx.Node) -> fx.Node:
        return program.insert_call(node.next, aten.mul.Tensor, (node, factor), like=node)

    return plant


class Chaotic(Amplifier):
    """Rounding grows to about a hundredth; one GELU stands before all of it, and a sigmoid beside."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.amplified(nn.functional.gelu(x)), x.sigmoid()


class Drowned(Chaotic):
    """Rounding is all that is left of the first result: any other numbers would do."""

    def __init__(self) -> None:
        super().__init__(gain=16.0)

    def bounded(self, y: Tensor) -> Tensor:
        return torch.sin(y)


X = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))


def named(checks: Sequence[Check], start: str) -> list[Check]:
    return [c for c in checks if c.name.startswith(start)]


@pytest.mark.parametrize("model", [Chaotic(), Drowned()], ids=["chaotic", "drowned"])
def test_rounding_is_excused_and_reported(build: Callable[..., thresher.Compiled], model: nn.Module) -> None:
    report = build(Other(), model, (X,)).report
    compiled = named(report.checks, "compiled")
    assert all(c.passed for c in report.checks) and all(c.excused for c in compiled)
    assert all(c.eager is not None and c.eager > c.tolerance for c in compiled)
    for text in (str(report), report.to_html()):
        assert "against float64" in text and "rounding explains it" in text and f"{compiled[0].eager:.1e}" in text
    assert Report.from_json(report.to_json()) == report


def test_what_differs_on_random_inputs_only_is_searched_there(build: Callable[..., thresher.Compiled]) -> None:
    """As a choice among numbers that are equal for some inputs, and not for the example's."""

    def wrong_above(program: Program, node: fx.Node) -> fx.Node:
        return program.insert_call(node.next, aten.clamp_max.default, (node, 0.55), like=node)

    model, x = (
        nn.Sequential(nn.Tanh(), nn.Sigmoid()),
        torch.tensor([[-9.0, 0.01, -5.5, -8.0], [0.02, -6.5, -9.5, -7.0]]),
    )
    with pytest.raises(ValidationError, match=r"random input(.|\n)*operator that diverges: sigmoid"):
        build(Other(aten.sigmoid.default, wrong_above), model, (x,), library="never")


@pytest.mark.parametrize("operator", ["gelu", "sigmoid"])
@pytest.mark.parametrize(
    ("model", "reason"),
    [(Chaotic(), "rounding does not explain the result"), (Drowned(), "a part differs when it is lowered alone")],
    ids=["chaotic", "drowned"],
)
def test_a_wrong_operator_is_not_excused(
    build: Callable[..., thresher.Compiled], model: nn.Module, reason: str, operator: str
) -> None:
    """Also where all of a result is rounding: then it is seen in the parts of the program."""
    target = getattr(aten, operator).default
    with pytest.raises(ValidationError) as error:
        build(Other(target, times(1.001)), model, (X,), library="never")
    assert f"operator that diverges: {operator} ({target}" in str(error.value)
    assert ("rounding does not explain the result" if operator == "sigmoid" else reason) in str(error.value)


@pytest.mark.parametrize("model", [Chaotic(), Drowned()], ids=["chaotic", "drowned"])
def test_torch_computes_what_is_lowered_wrongly(build: Callable[..., thresher.Compiled], model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"torch computes what is lowered in another way than torch does: gelu \(aten"):
        compiled = build(Other(aten.gelu.default, times(1.001)), model, (X,))
    assert all(c.passed for c in compiled.report.checks)


def test_a_wrong_pass_is_not_excused(build: Callable[..., thresher.Compiled]) -> None:
    """The rewritten program is compared with the eager model in the same way."""
    with pytest.raises(ValidationError, match=r"rewritten = eager, example input.*rounding does not explain") as error:
        build(Other(), Chaotic(), (X,), passes=[_Wrong()], verify="off")
    assert "exported" not in str(error.value)


class AsksWhetherItIsExported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() if torch.compiler.is_exporting() else x.cos()


def test_a_model_that_is_another_one_when_it_is_exported(build: Callable[..., thresher.Compiled]) -> None:
    with pytest.raises(ValidationError, match=r"rewritten = eager.*(?s:.*)asks whether it is traced or exported"):
        build(Other(), AsksWhetherItIsExported(), (X,))


class _Wrong(Pass):
    name = "wrong"

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        (node,) = work.calls(aten.gelu.default)
        user = next(iter(node.users))
        user.replace_input_with(node, times(1.01)(work, node))
        return PassResult(work, [Note.at(node, "made wrong")])


def test_an_artifact_brings_the_truth_with_it(build: Callable[..., thresher.Compiled]) -> None:
    compiled = build(Other(), Chaotic(), (X,))
    run = compiled.reference_run
    assert run.truth is not None and compiled.validate()[0].excused
    lists, tensors = run.to_json()
    again = ReferenceRun.from_json(lists, {name: t.numpy() for name, t in tensors.items()})
    execute = compiled.executable.run
    assert again.check(compiled.signature, lambda flat: [v.numpy() for v in execute(_torch(flat))]).excused
    with pytest.raises(ValidationError, match="rounding does not explain the result"):
        again.check(compiled.signature, lambda flat: [1.5 * v.numpy() for v in execute(_torch(flat))])


def _torch(flat: Sequence[Any]) -> list[Tensor]:
    return [torch.from_numpy(v) for v in flat]


def test_an_artifact_of_a_tame_model_brings_none(build: Callable[..., thresher.Compiled]) -> None:
    assert build(Other(), nn.Linear(4, 4), (torch.randn(2, 4),)).reference_run.truth is None


def test_a_random_input_that_the_model_refuses_is_noted(build: Callable[..., thresher.Compiled]) -> None:
    """The example shows nothing of what the model needs: two indices that sum to five."""
    table, a = torch.randn(6), torch.tensor([5, 0, 4, 1, 3, 2, 0, 5])
    report = build(Other(), Function(lambda a, b: table[a + b] * 1 + 0), (a, 5 - a), passes="exact").report
    skipped = [c for c in report.checks if c.skipped]
    assert {c.name for c in skipped} >= {"compiled = eager, random input"} and all(c.passed for c in report.checks)
    assert all("the model itself fails on it: IndexError: index" in c.skipped for c in skipped)
    assert any(c.name.endswith("in float64, random input") for c in skipped)
    assert named(report.checks, "compiled = eager, example input")[0].error == 0
    assert "not made" in str(report) and "not made: the model itself fails on it" in report.to_html()
    assert Report.from_json(report.to_json()) == report


def test_code_that_fails_where_the_model_does_not_is_wrong(build: Callable[..., thresher.Compiled]) -> None:
    def raising(program: Program, node: fx.Node) -> fx.Node:
        return program.insert_call(node.next, aten.view.default, (node, [3, 8]), like=node)

    class Raises(Other):
        def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
            executable = super().lower(program, target, lowering_options)
            executable.run = lambda inputs: 1 / 0
            return executable

    with pytest.raises(ValidationError, match="the model runs, but here is ZeroDivisionError"):
        build(Raises(), Function(torch.sigmoid), (X,))


def test_each_output_is_judged_by_its_dtype(build: Callable[..., thresher.Compiled]) -> None:
    """A coarse output beside it is no excuse for a fine one."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.bfloat16() * 2, x.sigmoid()

    with pytest.raises(ValidationError, match="sigmoid"):
        build(Other(aten.sigmoid.default, times(1.01)), Function(both), (X,), library="never")
    assert all(c.passed for c in build(Other(), Function(both), (X,)).report.checks)


def test_a_saved_chaotic_model_proves_itself(tmp_path: Path) -> None:
    compiled = thresher.compile(Chaotic(), (X,), target="cpu", tune="never")
    assert all(c.passed for c in compiled.report.checks)
    loaded = thresher.load(compiled.save(tmp_path / "m.thresher"))
    assert loaded.reference_run.truth is not None and loaded.validate()[0].passed


def test_a_choice_among_equal_numbers_is_torch_s() -> None:
    """Which of many equal numbers are the largest is not defined, and a model may depend on it."""

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        masked = torch.where(x > 0.8, x, -1.0)
        return y.gather(-1, masked.topk(20, -1).indices).sin()

    args = torch.rand(3, 64), torch.randn(3, 64)
    with pytest.raises(ValidationError, match="lowered together but not alone"):
        thresher.compile(Function(chosen), args, target="cpu", library="never")
    with pytest.warns(UserWarning, match="torch computes what is lowered in another way"):
        compiled = thresher.compile(Function(chosen), args, target="cpu")
    assert [call.operator for call in compiled.report.library] == ["aten.topk.default"]
    other = torch.rand(3, 64)
    assert torch.allclose(compiled(other, args[1]), chosen(other, args[1]), atol=1e-5)
