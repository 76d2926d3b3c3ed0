"""The stages of a build: values that show themselves, and options that check themselves."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from helpers.clocks import FakeClock, compile_with
from thresher.analysis.cost.break_even import BreakEven, Layer
from thresher.approximation.budget import Budget
from thresher.driver.compile import lower
from thresher.driver.options import CompileOptions
from thresher.driver.session import open_session
from thresher.driver.stages import Build, Captured, Rewritten, capture_model, lower_again, lower_program, transform
from thresher.errors import InputError, RecordsError, ThresherError
from thresher.passes import pipelines
from thresher.rewriting.contract import Context, Pass, PassResult
from thresher.tuning.records import Records

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def half_dead() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[0].bias[::2] = 0
    return model


@pytest.mark.parametrize(("to", "kind"), [("captured", Captured), ("rewritten", Rewritten), ("lowered", Build)])
def test_lower_stops_after_any_stage(to: str, kind: type) -> None:
    stage = lower(half_dead(), (X,), to=to, target="cpu")
    assert isinstance(stage, kind)
    hidden = 6 if to == "captured" else 3
    assert stage.cost().parameters == hidden * 8 + hidden + 2 * hidden + 2
    assert stage.cost().flops == 2 * 3 * (8 * hidden + hidden * 2) and stage.cost().milliseconds > 0
    assert ("define " if to == "lowered" else "aten.linear.default") in stage.as_text()


def test_a_stage_does_not_change_what_it_is_given() -> None:
    options = CompileOptions(target="cpu")
    with open_session(options, FakeClock()) as session:
        captured = capture_model(half_dead(), (X,), None, options, session)
        text = captured.as_text()
        rewritten = transform(captured, pipelines.resolve("exact"), None, options, session)
        assert captured.as_text() == text != rewritten.as_text()
        text = rewritten.as_text()
        build = lower_program(rewritten, _plain(session), None, options, session)
        again = lower_again(build, dataclasses.replace(build.lowering_options, strict_rounding=True), session)
        assert rewritten.as_text() == text and again.specialized == build.specialized
        assert not build.lowering_options.strict_rounding and again.lowering_options.strict_rounding
        assert set(session.seconds) == {"capture", "passes", "lower"}


def _plain(session):
    from thresher.driver.compile import lowering_options_of

    return lowering_options_of(CompileOptions(target="cpu"), session)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"speed": 1}, InputError, "there is no option 'speed'; the options: .*batch_sizes"),
        ({"to": "compiled"}, InputError, "to must be 'captured', 'rewritten' or 'lowered', not 'compiled'"),
        ({"batch_sizes": (0,)}, InputError, "positive whole numbers"),
        ({"verify": "never"}, ThresherError, "verify must be one of 'each', 'final', 'off'"),
        ({"tune": "always"}, ThresherError, "tune must be 'recorded', 'never' or a thresher.Tune"),
        ({"budget": Budget(cosine=0.1)}, InputError, "need both: calibration="),
        (
            {"budget": Budget(cosine=0.1), "calibration": [X] * 4, "widths": "measured"},
            InputError,
            "with a budget use widths='rule'",
        ),
        ({"masks": {"0.weight": torch.ones(7)}}, InputError, "give one of the same shape"),
    ],
)
def test_wrong_settings_are_named(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        lower(half_dead(), (X,), **settings)


def test_options_are_frozen_and_filled_in() -> None:
    options = CompileOptions(batch_sizes=[8, 1, 8])
    assert options.batch_sizes == (1, 8) and options.target
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.target = "cpu"  # type: ignore[misc]


def test_records_that_cannot_be_kept_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked file is waited for: once a build, not once a layer; what was measured is used all the same."""
    attempts = []

    def locked(records: Records, entries: list) -> int:
        attempts.append(entries)
        raise RecordsError("the file is locked")

    monkeypatch.setattr(Records, "put", locked)
    clock = FakeClock(break_even=lambda layer: BreakEven(1.0, (0.01, 1.0), (0.01, 1.0)))
    layers = [Layer("input", rows, 64, 64, False) for rows in (1, 2, 3)]
    with open_session(CompileOptions(target="cpu"), clock) as session, pytest.warns(UserWarning, match="not kept"):
        assert [session.break_even(layer).measured for layer in layers] == [True] * 3
    assert len(attempts) == 1 and len(clock.asked) == 3


def test_failures_of_specialising_passes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run after the others, and what fails there is said, too."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Pass):
        name = "broken-for-a-test"

        def apply(self, program, context: Context) -> PassResult:
            raise ValueError("no such layout")

    monkeypatch.setattr(pipelines, "specialize", (*pipelines.specialize, Broken()))
    compiled = compile_with(FakeClock(), half_dead(), (X,), target="cpu")
    (record,) = [r for r in compiled.report.passes if r.name == "broken-for-a-test"]
    line = inspect.getsourcelines(Broken.apply)[1] + 1
    assert record.status == "reverted" and record.failure == f"ValueError: no such layout ({__file__}:{line})"
    assert "broken-for-a-test" in str(compiled.report)
