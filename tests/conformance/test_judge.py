"""The judge sees what is wrong: compilers with a planted fault, one of each kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.conformance.judge import Verdict, judge, leaf_difference
from thresher.errors import BackendError, ValidationError
from thresher.models.families.sample import Case, Inputs, SampleExcluded


class TwoOutputs(nn.Module):
    """A float and an integer result; it counts its calls in its second input."""

    def forward(self, x: Tensor, calls: Tensor) -> dict[str, Tensor]:
        calls += 1
        return {"logits": torch.log(x), "choice": x.argmax(-1)}


def two_outputs() -> Case:
    def inputs(seed: int) -> Inputs:
        x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))  # some logarithms are NaN
        return Inputs((x, torch.zeros(1)))

    return Case(TwoOutputs(), inputs(0), [inputs(1)])


def compiled(function: Callable[..., Any], library: tuple[str, ...] = ()) -> Any:
    """Return ``function`` as a compiled model."""
    wrapped = partial(function)
    wrapped.report = SimpleNamespace(library=library)  # type: ignore[attr-defined]
    return wrapped


def compiler(change: Callable[[dict[str, Tensor]], Any], library: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Return a compiler whose models compute what eager does, and then change the outputs."""

    def compile_model(model: nn.Module, args: tuple, kwargs: dict, **options: Any) -> Any:
        assert options["validate"] == "error"
        return compiled(lambda *a, **k: change(model(*a, **k)), library)

    return compile_model


def raising(error: Exception) -> Callable[..., Any]:
    """Return a compiler that raises."""

    def compile_model(*args: Any, **options: Any) -> Any:
        raise error

    return compile_model


def without_writes(model: nn.Module, args: tuple, kwargs: dict, **options: Any) -> Any:
    """Compile to a model that leaves its inputs alone."""
    return compiled(lambda x, calls: model(x, calls.clone()))


def only_for(model: nn.Module, args: tuple, kwargs: dict, **options: Any) -> Any:
    """Compile to a model that is right on the example inputs alone."""
    right = model(*(a.clone() for a in args))

    def call(x: Tensor, calls: Tensor) -> Any:
        calls += 1
        return right

    return compiled(call)


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return compiler(lambda outputs: {**outputs, key: change(outputs[key])})


def test_equal() -> None:
    verdict = judge(two_outputs, compiler(lambda outputs: outputs))
    assert (verdict.outcome, verdict.reason) == ("equal", "")
    assert verdict.build_seconds is not None and verdict.milliseconds and verdict.eager_milliseconds


def test_library() -> None:
    verdict = judge(two_outputs, compiler(lambda outputs: outputs, library=("log",)))
    assert (verdict.outcome, verdict.library) == ("library", ["log"])


@pytest.mark.parametrize(
    ("compile_model", "reason"),
    [
        (changed("logits", lambda v: v * (1 + 1e-3)), r"output 0: error 1\.0e-03 of the scale \(bound 1e-04\)"),
        (changed("logits", lambda v: v.double()), "output 0: dtype torch.float64 instead of torch.float32"),
        (changed("logits", lambda v: v[:, None]), r"output 0: shape \(3, 1, 5\) instead of \(3, 5\)"),
        (changed("logits", lambda v: v.nan_to_num(0.0)), "output 0: NaN in other places"),
        (changed("choice", lambda v: (v + 1) % 5), "output 1: 3 of 3 values differ"),
        (changed("choice", lambda v: v.int()), "output 1: dtype torch.int32 instead of torch.int64"),
        (compiler(lambda outputs: (outputs["logits"], outputs["choice"])), "structure"),
        (compiler(lambda outputs: outputs["logits"]), "1 outputs instead of 2"),
        (without_writes, r"input 1 after the call: error 1\.0e\+00 of the scale"),
        (only_for, "other inputs: output 0"),
    ],
)
def test_wrong(compile_model: Callable[..., Any], reason: str) -> None:
    verdict = judge(two_outputs, compile_model)
    assert verdict.outcome == "wrong"

    assert re.match(reason, verdict.reason), verdict.reason


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BackendError("node relu: no rule\nand more"), Verdict("refused", "BackendError: node relu: no rule")),
        (
            ValidationError("compiled = eager: error 1"),
            Verdict("invalid", "ValidationError: compiled = eager: error 1"),
        ),
        (IndexError("list index out of range"), Verdict("crashed", "IndexError: list index out of range")),
        (MemoryError(), Verdict("crashed", "MemoryError: ")),
    ],
)
def test_errors(error: Exception, expected: Verdict) -> None:
    assert judge(two_outputs, raising(error)) == expected


def test_a_call_that_fails() -> None:
    def compile_model(*args: Any, **options: Any) -> Any:
        return compiled(lambda *a: 1 // 0)

    assert judge(two_outputs, compile_model).outcome == "crashed"


class Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.dropout(x, 0.5, True)


class Seeded(nn.Module):
    """Draws the same numbers at every call, as PyTorch's own samples of random operators do."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(42)
        return torch.dropout(x, 0.5, True)


class SeededForNothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(42)
        return x + 1


class Uninitialized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(x.shape)


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(7, 7)


def excluded() -> Case:
    raise SampleExcluded("it has strings")


@pytest.mark.parametrize(
    ("build", "outcome"),
    [
        (lambda: Case(Dropout(), Inputs((torch.ones(64),))), "random"),
        (lambda: Case(Seeded(), Inputs((torch.ones(64),))), "random"),
        (lambda: Case(Uninitialized(), Inputs((torch.ones(64),))), "random"),
        (lambda: Case(Failing(), Inputs((torch.ones(64),))), "eager"),
        (excluded, "excluded"),
    ],
)
def test_counted_apart(build: Callable[[], Case], outcome: str) -> None:
    """None of these reaches the compiler."""
    assert judge(build, raising(AssertionError("compiled"))).outcome == outcome


def test_a_seed_alone_makes_no_sample_random() -> None:
    case = Case(SeededForNothing(), Inputs((torch.ones(4),)))
    assert judge(lambda: case, compiler(lambda outputs: outputs)).outcome == "equal"


class Cancelling(nn.Module):
    """Its result in float32 has few digits."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1000.0) - 1000.0


def test_truth_decides_where_eager_itself_is_far_off() -> None:
    """Rounding differently from eager is no fault; being worse than it is."""

    def case() -> Case:
        return Case(Cancelling(), Inputs((torch.linspace(0, 1e-2, 50),)))

    def compile_exact(model: nn.Module, *args: Any, **options: Any) -> Any:
        return compiled(lambda x: x.clone())

    def compile_coarse(model: nn.Module, *args: Any, **options: Any) -> Any:
        return compiled(lambda x: (x + 64000.0) - 64000.0)

    assert judge(case, compile_exact).outcome == "equal"
    assert judge(case, compile_coarse).outcome == "wrong"


def test_stored_outputs_are_the_reference() -> None:
    case = Case(nn.ReLU(), Inputs((torch.ones(2),), expected=[np.zeros(2, np.float32)]))
    assert judge(lambda: case, compiler(lambda outputs: outputs)).outcome == "wrong"


@pytest.mark.parametrize(
    ("expected", "actual", "equal"),
    [
        (torch.tensor([1.0, 1e-7]), torch.tensor([1.0, 0.0]), True),  # relative to the scale
        (torch.tensor([1e-7]), torch.tensor([0.0]), False),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("-inf"), 1.0]), False),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.zeros(3), torch.zeros(3), True),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.tensor([2**62 + 1]), torch.tensor([2**62]), False),  # not the same in float64
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.01], dtype=torch.bfloat16), True),
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-8], dtype=torch.float64), False),
        (torch.tensor([1.0]).to(torch.float8_e4m3fn), torch.tensor([1.125]).to(torch.float8_e4m3fn), False),
        (3, 3, True),
        (3, 3.0, False),
        (float("nan"), float("nan"), True),
        (None, torch.zeros(1), False),
        (torch.eye(2), torch.eye(2).to_sparse(), False),
    ],
)  # fmt: skip
def test_leaves(expected: Any, actual: Any, equal: bool) -> None:
    assert (leaf_difference(expected, actual) == "") is equal
