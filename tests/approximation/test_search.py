"""Budgets and the search: what is chosen stays within the limit, more is chosen for more budget, and the same every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from thresher import Budget
from thresher.approximation.budget import METRICS
from thresher.approximation.calibration import Calibration
from thresher.approximation.ledger import Change, Spent, coarse
from thresher.approximation.search import Candidate, hull, ladder, last_of_each_key, order_candidates
from thresher.errors import InputError, PassError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.report.data import Figures
from thresher.report.report import Report
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.manager import PassManager

# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "a budget takes one of"),
        ({"rel_l2": 0.1, "cosine": 0.1}, "a budget takes one of"),
        ({"metric": lambda a, b: 0.0}, "a budget takes one of"),
        ({"rel_l2": -1.0}, "a number from 0 on"),
        ({"rel_l2": math.nan}, "a number from 0 on"),
        ({"rel_l2": 0.1, "held_out": 1.0}, "held_out"),
        ({"rel_l2": 0.1, "confidence": 0.2}, "confidence"),
    ],
)
def test_wrong_budgets(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**given)


def test_metrics_by_hand() -> None:
    a, b = [torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 4.5]])]
    assert METRICS["rel_l2"](a, b) == pytest.approx(0.1)
    assert METRICS["cosine"](a, [2 * a[0]]) == pytest.approx(0)
    assert METRICS["cosine"](a, [torch.tensor([[4.0, -3.0]])]) == pytest.approx(1)
    assert METRICS["top1"](a, [torch.tensor([[5.0, 4.0]])]) == 1
    assert METRICS["kl"](a, a) == 0 and METRICS["kl"](a, b) > 0


def test_a_limit_holds_for_the_mean_to_be_expected() -> None:
    """Of 200 draws of 8 errors with mean 1, the bound is over 1 in 99 % or so."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.empty(200, 8).normal_(1.0, 0.3, generator=generator)
    bounds = [Budget(rel_l2=1.0).summary(row.tolist()).bound for row in draws]
    assert sum(b >= 1 for b in bounds) >= 194
    found = Budget(rel_l2=1.0).summary([0.1, 0.5, 0.3])
    assert (found.mean, found.worst, found.worst_sample) == (pytest.approx(0.3), 0.5, 1)
    assert (
        Budget(top1=0.1).summary([0.0] * 10, rows=8).bound > 0.05 > Budget(top1=0.1).summary([0.0] * 100, rows=8).bound
    )
    assert Budget(rel_l2=1.0).summary([0.1, math.nan]).bound == math.inf


# ---------------------------------------------------------------------- the order

CANDIDATES = st.lists(
    st.builds(
        lambda key, error, saved, i: Candidate(key, key, f"{i}", error, saved),
        st.sampled_from("abc"),
        st.floats(0, 1),
        st.floats(-1, 1),
        st.integers(0, 1000),
    ),
    max_size=30,
    unique_by=lambda c: (c.key, c.choice),
)


@given(CANDIDATES)
def test_a_hull_has_falling_gains(candidates: list[Candidate]) -> None:
    corners = hull([c for c in candidates if c.key == "a"])
    gains = [gain for gain, _ in corners]
    assert gains == sorted(gains, reverse=True)
    saved, errors = [c.saved for _, c in corners], [c.error for _, c in corners]
    assert saved == sorted(saved) and errors == sorted(errors) and all(s > 0 for s in saved)
    if corners:  # nothing is both better and cheaper than a corner
        assert all(c.saved <= max(saved) for c in candidates if c.key == "a")


@given(CANDIDATES)
def test_a_path_never_takes_back(candidates: list[Candidate]) -> None:
    path = order_candidates(candidates)
    for i in range(len(path)):
        before, after = ({c.key: c for c in last_of_each_key(path[:n])} for n in (i, i + 1))
        assert all(after[key].saved >= c.saved for key, c in before.items())
    assert len(last_of_each_key(path)) == len({c.key for c in path})


@given(st.floats(1e-6, 10), st.floats(1e-6, 10))
def test_a_larger_limit_tries_all_that_a_smaller_one_tries(a: float, b: float) -> None:
    small, large = sorted((a, b))
    rungs = ladder(large)
    assert all(r <= large * (1 + 1e-6) for r in rungs)
    assert all(any(math.isclose(r, s) for s in rungs) for r in ladder(small) if r >= rungs[-1])


# ---------------------------------------------------------------------- the search


class Sums(nn.Module):
    """x times a matrix for every layer, all added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)  # type: ignore[return-value]


@dataclass(frozen=True)
class Damp(ApproximatePass):
    """Multiply weights by 1 - e: the error is known, and the saving whatever we say."""

    name: ClassVar[str] = "damp"
    amounts: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        weights = [n for n in program.graph.nodes if n.op == "get_attr"]
        made = [
            Candidate(n.name, n.name, f"{e}", e * e, (i + 1) * e**0.5, n.name, n.name, (str(n.target), e))
            for i, n in enumerate(weights)
            for e in self.amounts
        ]
        return made, []

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        for c in chosen:
            name, amount = c.payload
            work.constants[name] = work.constants[name] * (1 - amount)
        return work


def damped(budget: Budget, samples: Sequence[Any], model: nn.Module) -> tuple[Program, Calibration, PassManager]:
    program = capture(model, (samples[0],))
    calibration = Calibration.of(program, samples, budget)
    manager = PassManager([Damp()])
    return manager.run(program, Context(calibration=calibration)), calibration, manager


def inputs(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(seed)))


@given(st.floats(1e-4, 0.5), st.floats(1e-4, 0.5), st.integers(0, 20))
@settings(max_examples=10, deadline=None)
def test_more_budget_changes_more_and_the_held_out_error_stays_within(a: float, b: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, samples = Sums(), inputs(12, seed)
    amounts = []
    for limit in sorted((a, b)):
        program, calibration, manager = damped(Budget(rel_l2=limit, seed=seed), samples, model)
        assert calibration.measure(program, calibration.held_out_samples).bound <= limit
        amounts.append(sum(float(note.message) for note in manager.records[0].rewrites))
    assert amounts[0] <= amounts[1]


def test_a_budget_of_nothing_changes_nothing() -> None:
    program, _, manager = damped(Budget(rel_l2=0.0), inputs(8), model := Sums())
    assert manager.records[0].status == "unchanged" and not manager.ledger
    assert program.structurally_equal(capture(model, (inputs(1)[0],)))


def test_the_search_repeats_itself() -> None:
    torch.manual_seed(0)
    model = Sums()
    texts = [
        [n.message for n in damped(Budget(rel_l2=0.05), inputs(8), model)[2].records[0].rewrites] for _ in range(2)
    ]
    assert texts[0] == texts[1] != []


def test_a_metric_of_ones_own_takes_what_the_model_returns() -> None:
    seen = []

    def drop(reference: Tensor, candidate: Tensor) -> float:
        seen.append(reference.shape)
        return float((reference - candidate).abs().mean())

    damped(Budget(metric=drop, max_drop=0.01), inputs(8), Sums())
    assert set(seen) == {torch.Size([3, 8])}


def test_two_passes_share_a_budget() -> None:
    program = capture(Sums(), (inputs(1)[0],))
    calibration = Calibration.of(program, inputs(10), Budget(rel_l2=0.1))
    manager = PassManager([Damp((0.05,)), Damp((0.02, 0.08))])
    manager.run(program, Context(calibration=calibration))
    first, second = manager.ledger
    assert first.held_out.bound <= 0.05 and second.held_out.bound <= 0.1
    assert second.before == pytest.approx(first.after)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (inputs(3), "at least 4 samples"),
        ([*inputs(4), torch.randn(3, 7)], "calibration sample 4"),
        ([(x, x) for x in inputs(4)], "calibration sample 0"),
    ],
)
def test_wrong_samples(samples: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Calibration.of(capture(Sums(), (inputs(1)[0],)), samples, Budget(rel_l2=0.1))


def test_approximate_passes_ask_for_samples() -> None:
    with pytest.raises(PassError, match="calibration="):
        PassManager([Damp()]).run(capture(Sums(), (inputs(1)[0],)))
    with pytest.raises(InputError, match="widths='rule'"):
        thresher.compile(Sums(), (inputs(1)[0],), budget=Budget(rel_l2=0.1), calibration=inputs(8), widths="measured")
    with pytest.raises(InputError, match="need both"):
        thresher.compile(Sums(), (inputs(1)[0],), budget=Budget(rel_l2=0.1), backend="eager")


def test_exact_passes_around_approximate_ones_are_checked_for_themselves() -> None:
    program = capture(Sums(), (inputs(1)[0],))
    context = Context(calibration=Calibration.of(program, inputs(8), Budget(rel_l2=0.1)))
    manager = PassManager(["simplify", Damp(), "simplify"], "each")
    manager.run(program, context)
    assert [r.status for r in manager.records] == ["changed", "changed", "unchanged"]
    assert manager.exact is not None and manager.exact.structurally_equal(PassManager(["simplify"]).run(program))


def test_the_report_draws_heads_and_survives_json() -> None:
    mass, mask = [[0.5, 0.1], [0.0, 1.0]], [[1.0, 0.0], [1.0, 1.0]]
    change = Change("layer", "head 0: a window", 1e-4, 0.2, mass, mask)
    spent = Spent("sparse-attention", 0.0, 0.01, Budget(rel_l2=0.1).summary([0.01, 0.01]), [change])
    report = Report(
        "m", "cpu", "tvm", Figures(1, 1, 1), Figures(1, 1, 1), spent=[spent], attention=[("layer", "2 heads")]
    )
    page = report.to_html()
    assert page.count("<svg") == 1 and page.count("M1 0h1v1h-1z") == 2 and "head 0: a window" in page
    assert Report.from_json(report.to_json()) == report
    assert "sparse-attention" in str(report)


def test_large_grids_are_drawn_coarse() -> None:
    grid = torch.rand(100, 70).tolist()
    small = coarse(grid)
    assert len(small) <= 32 and len(small[0]) <= 32
    assert small[0][0] == pytest.approx(torch.tensor(grid)[:4, :3].mean().item(), abs=1e-3)
