"""Thresholds: every spelling is one operator, which computes the same to the last bit; what is none is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.ops.shrink import KEEPS
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager, PassRecord

SHRINK, GROUP = torch.ops.thresher.shrink.default, torch.ops.thresher.group_shrink.default
T, T2 = 0.4, 0.9
INF, NAN = float("inf"), float("nan")


def canonical(function: Callable, *inputs: Tensor) -> tuple[Program, PassRecord]:
    manager = PassManager(pipelines.canonicalize)
    program = manager.run(capture(Function(function), inputs))
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    return program, next(r for r in manager.records if r.name == "canonicalize-threshold")


def special(columns: int = 9) -> Tensor:
    """[rows, columns]: everything that could make a difference."""
    edges = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 1e-30]
    for t in (T, T2, 0.0, 2.5):
        near = torch.tensor(t)
        edges += [t, -t, 2 * t, -2 * t, t / 2]
        edges += [
            v
            for s in (1, -1)
            for v in ((s * near).nextafter(near.new_tensor(INF)), (s * near).nextafter(-near.new_tensor(INF)))
        ]
    return torch.tensor([float(e) for e in edges])[:, None].repeat(1, columns)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, but for the sign of 0."""
    return torch.equal(a.nan_to_num(7.5, 8e8, -8e8), b.nan_to_num(7.5, 8e8, -8e8)) and torch.equal(a.isnan(), b.isnan())


zero = torch.zeros
SPELLINGS: dict[str, tuple[str, Callable]] = {
    "two relu": ("soft", lambda x: F.relu(x - T) - F.relu(-x - T)),
    "two relu, negated": ("soft", lambda x: F.relu(x - T) - F.relu(-(x + T))),
    "two relu, reversed": ("soft", lambda x: F.relu(x - T) - F.relu(-T - x)),
    "two relu, added": ("soft", lambda x: (x - T).relu() + (-1) * (-x - T).relu()),
    "two relu, one from a factor": ("soft", lambda x: F.relu(x - T) + torch.rsub(F.relu(-x / 2 - T / 2), 0.0, alpha=2)),
    "sign": ("soft", lambda x: torch.sign(x) * F.relu(x.abs() - T)),
    "sgn, clamp": ("soft", lambda x: torch.clamp(x.abs() - T, min=0) * torch.sgn(x)),
    "sign, maximum": ("soft", lambda x: torch.sign(x) * torch.maximum(x.abs() - T, torch.zeros_like(x))),
    "clamp": ("soft", lambda x: x - x.clamp(-T, T)),
    "softshrink": ("soft", lambda x: F.softshrink(x, T)),
    "nested where": ("soft", lambda x: torch.where(x > T, x - T, torch.where(x < -T, x + T, 0 * x))),
    "where": ("hard", lambda x: torch.where(x.abs() > T, x, zero(()))),
    "where, at least": ("hard", lambda x: torch.where(x.abs() >= T, x, 0.0)),
    "where, inverse": ("hard", lambda x: torch.where(x.abs() <= T, zero(()), x)),
    "masked_fill": ("hard", lambda x: x.masked_fill(x.abs() < T, 0)),
    "gate": ("hard", lambda x: x * (x.abs() > T)),
    "gate as a number": ("hard", lambda x: x * (x.abs() > T).float()),
    "not below": ("hard", lambda x: x * torch.logical_not(x.abs() <= T)),
    "both sides": ("hard", lambda x: torch.where((x > T) | (x < -T), x, 0.0)),
    "hardshrink": ("hard", lambda x: F.hardshrink(x, T)),
    "threshold": ("above", lambda x: F.threshold(x, T, 0.0)),
    "above": ("above", lambda x: torch.where(x > T, x, zero(()))),
    "above a negative number": ("above", lambda x: torch.where(x > -T, x, zero(()))),
    "above, gate": ("above", lambda x: (x > T) * x),
    "above, gate, at least": ("above", lambda x: x * (x >= T)),
    "relu behind hard": ("above", lambda x: F.relu(F.hardshrink(x, T))),
    "hard behind relu": ("above", lambda x: F.hardshrink(F.relu(x), T)),
    "shifted relu": ("positive", lambda x: F.relu(x - T)),
    "shifted clamp": ("positive", lambda x: (x - T).clamp(min=0)),
    "relu behind soft": ("positive", lambda x: F.softshrink(x, T).relu()),
    "soft behind relu": ("positive", lambda x: F.softshrink(x.relu(), T)),
    "soft twice": ("soft", lambda x: F.softshrink(F.softshrink(x, T), 0.25)),
    "firm": ("firm", lambda x: torch.where(x.abs() <= T, 0.0, torch.where(x.abs() <= T2, x.sign() * T2 * (x.abs() - T) / (T2 - T), x))),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    kind, function = SPELLINGS[name]
    x = special()
    program, _ = canonical(function, x)
    (site,) = program.calls()
    assert site.target is SHRINK and site.args[2] == kind
    if kind != "firm" and name != "soft twice":  # where the order of roundings is another one
        assert same(function(x), program.run(x)[0])
    wide = x.nan_to_num(0.3, 5, -5).double()
    torch.testing.assert_close(program.run(wide, dtype=torch.float64)[0], function(wide), rtol=1e-6, atol=1e-7)


DIVIDING: dict[str, tuple[str, Callable]] = {
    "modulus": ("soft", lambda x: x * F.relu(1 - T / x.abs())),
    "modulus, clamp": ("soft", lambda x: x * torch.clamp(1 - T / x.abs(), min=0)),
    "garrote": ("garrote", lambda x: x * F.relu(1 - T**2 / x**2)),
    "garrote, product": ("garrote", lambda x: x * F.relu(1 - T**2 / (x * x))),
    "garrote, where": ("garrote", lambda x: torch.where(x.abs() > T, x - T**2 / x, torch.zeros_like(x))),
    "modulus, as a product": ("soft", lambda x: x * F.relu(1 - x.abs().reciprocal() * T)),
    "modulus, for each channel": ("soft", lambda x: x * F.relu(1 - torch.tensor([0.3, 0.2]) / x.abs())),
    "pairs": ("group", lambda x: x * F.relu(1 - T / x.square().sum(-1, keepdim=True).sqrt())),
    "pairs, the dimension later": ("group", lambda x: x * F.relu(1 - T / x.square().sum(-1).sqrt()).unsqueeze(-1)),
    "groups": ("group", lambda x: x * F.relu(1 - T / torch.linalg.vector_norm(x, dim=-1, keepdim=True))),
}


def test_what_is_wider_than_the_value_is_no_part_of_the_threshold() -> None:
    x = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    program, _ = canonical(lambda x: F.relu(x - 0.3) + torch.zeros(4, 9), x)
    assert program.run(x)[0].shape == (4, 9)


def test_norms_of_rows_that_scale_columns_are_none() -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    function = lambda x: x * F.relu(1 - T / x.square().sum(-1).sqrt()).unsqueeze(0)  # noqa: E731
    program, _ = canonical(function, x)
    torch.testing.assert_close(program.run(x)[0], function(x))


def test_relu_stays() -> None:
    program, record = canonical(F.relu, torch.randn(4, 9))
    assert [n.target for n in program.calls()] == [torch.ops.aten.relu.default] and not record.refusals


def test_two_thresholds_per_channel_are_not_one() -> None:
    other = torch.linspace(0.1, 0.9, 9)
    model = Learned(lambda x, t: F.relu(x - t) - F.relu(-x - other), torch.linspace(0.2, 0.8, 9))
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    program = PassManager(pipelines.canonicalize).run(capture(model, (x,)))
    assert {n.args[2] for n in program.calls(SHRINK)} <= {"positive"}
    torch.testing.assert_close(program.run(x)[0], model(x))


@pytest.mark.parametrize("name", DIVIDING)
def test_spellings_with_a_quotient(name: str) -> None:
    kind, function = DIVIDING[name]
    x = special(2)
    program, _ = canonical(function, x)
    (site,) = program.calls()
    assert site.target is GROUP if kind == "group" else site.args[2] == kind
    torch.testing.assert_close(program.run(x)[0], function(x), rtol=1e-5, atol=1e-6, equal_nan=True)


class Learned(nn.Module):
    """A threshold per channel, of any sign."""

    def __init__(self, function: Callable, theta: Tensor):
        super().__init__()
        self.theta, self.function = nn.Parameter(theta), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.theta)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("soft", lambda x, t: F.relu(x - t) - F.relu(-x - t)),
        ("soft", lambda x, t: x.sign() * F.relu(x.abs() - t)),
        ("soft", lambda x, t: x - torch.clamp(x, -t, t)),
        ("hard", lambda x, t: torch.where(x.abs() > t, x, 0.0)),
        ("positive", lambda x, t: F.relu(x - t)),
        ("above", lambda x, t: x * (x > t)),
    ],
)
def test_thresholds_per_channel(kind: str, function: Callable) -> None:
    theta = torch.tensor([0.0, T, T2, 2.5, 0.1, 7.0, T, 1.0, 3.0])
    x, model = special(), Learned(function, theta)
    program = PassManager(pipelines.canonicalize).run(capture(model, (x,)))
    (site,) = program.calls()
    assert site.args[2] == kind and torch.equal(program.constant(site.args[1]), theta)
    assert same(model(x), program.run(x)[0])


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("soft", lambda x: x - torch.clamp(x, -(t := torch.sigmoid(x.mean(-1, keepdim=True))), t)),
        ("soft", lambda x: x.sign() * F.relu(x.abs() - 0.5 * x.abs().amax(-1, keepdim=True))),
        ("hard", lambda x: x * (x.abs() >= x.abs().topk(3, -1).values[..., -1:])),
        ("above", lambda x: torch.where(x >= x.topk(3, -1).values[..., -1:], x, 0.0)),
    ],
)
def test_thresholds_that_are_computed(kind: str, function: Callable) -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    program, _ = canonical(function, x)
    (site,) = program.calls(SHRINK)
    assert site.args[2] == kind and program.constant(site.args[1]) is None
    assert same(function(x), program.run(x)[0])


def test_computed_for_any_number_of_rows() -> None:
    function = Function(lambda x: x * (x.abs() >= x.abs().topk(3, -1).values[..., -1:]))
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    captured = capture(function, (x,), dynamic_shapes=(({0: torch.export.Dim("rows", min=2)},),))
    program = PassManager(pipelines.canonicalize).run(captured)
    assert len(list(program.calls(SHRINK))) == 1
    assert same(function(x[:3]), program.run(x[:3])[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x - x.clamp(-0.3, 0.4), "not symmetric"),
        (lambda x: torch.where((x > T) | (x < -T2), x, 0.0), "not symmetric"),
        (lambda x: x * F.relu(1 + T / x.abs()), None),
        (lambda x: x * F.relu(1 - torch.tensor([0.3, 0, 0.2]).repeat(3) / x.abs()), None),
        (lambda x: x * F.relu(1 - torch.full((9,), 0.2) / x**2), None),
        (lambda x: torch.where(x.abs() > T, x - 0.3**2 / x, 0.0), None),
        (lambda x: torch.where(x.abs() > T, x - T**2 / x, 1.0), None),
        (lambda x: 2 * F.softshrink(x, T) - x.clamp(0, 0), "scaled"),
        (lambda x: F.relu(x + 0.4) - F.relu(-x + 0.4), None),
        (lambda x: torch.sign(x) * F.relu(x.abs() - x.mean()), "may be negative"),
        (lambda x: torch.where(x.abs() > T, x, 0.1), None),
        (lambda x: F.threshold(x, 0.2, 7.0), None),
        (lambda x: torch.where((x > T) | (x <= -T), x, 0.0), "at its breakpoints"),
        (lambda x: F.relu(x - x.flip(0)), None),
        (lambda x: F.relu(x) + x.clamp(max=0), None),
        (lambda x: (x - T).relu().to(torch.int32).float(), None),
    ],
)
def test_what_is_no_threshold(function: Callable, message: str | None) -> None:
    program, record = canonical(function, torch.randn(4, 9))
    kinds = [n.args[2] for n in program.calls(SHRINK)]
    assert not {"soft", "hard"} & set(kinds) or message == "scaled"
    if message:
        assert any(message in n.message for n in record.refusals)


PIECES = ["relu", "soft", "hard", "above", "positive", "abs", "neg", "double"]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from([0.25, 0.5, 1.0])), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_whatever_is_written_is_the_same_function(steps: list[tuple[str, float]]) -> None:
    """Random chains: the passes find what they can, and the result is equal for every special value."""

    def function(x: Tensor) -> Tensor:
        for kind, t in steps:
            x = {
                "relu": lambda x, t: x.relu(), "abs": lambda x, t: x.abs(), "neg": lambda x, t: -x, "double": lambda x, t: 2 * x,
                "soft": F.softshrink, "hard": F.hardshrink, "positive": lambda x, t: (x - t).relu(),
                "above": lambda x, t: torch.where(x > t, x, 0.0),
            }[kind](x, t)  # fmt: skip
        return x

    x = torch.cat([special(2), torch.arange(-16, 17)[:, None].repeat(1, 2) / 8])
    program, _ = canonical(function, x)
    assert same(function(x), program.run(x)[0])


# ---------------------------------------------------------------------- the operator


@pytest.mark.parametrize("kind", ["soft", "hard", "garrote", "firm", "positive", "above"])
def test_shrink_has_a_gradient_and_a_fake(kind: str) -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t, t2 = (torch.full((7,), v, dtype=torch.float64, requires_grad=True) for v in (0.3, 0.8))
    more = ("nle", t2) if kind == "firm" else ()
    assert torch.autograd.gradcheck(lambda a, b: SHRINK(a, b, kind, *more), (x, t))
    assert SHRINK(x.to("meta"), t.to("meta"), kind, "nle", *([t2.to("meta")] if more else [])).shape == (5, 7)


def test_group_shrink_has_a_gradient() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: GROUP(a, torch.full((1,), 0.3, dtype=torch.float64)), x)


def test_bad_arguments_are_named() -> None:
    x, t = torch.randn(3), torch.ones(())
    for args, message in [
        ((x, t, "sideways"), "unknown kind"),
        ((x, t, "hard", "most"), "unknown keep"),
        ((x, t, "firm"), "t2 is needed"),
        ((x, t, "soft", "nle", t), "no other"),
    ]:
        with pytest.raises(ValueError, match=message):
            SHRINK(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "keep"),
    [(kind, keep) for kind in ("hard", "above") for keep in KEEPS]
    + [(k, "nle") for k in ("soft", "garrote", "firm", "positive")],
)
def test_compiled_thresholds_are_equal_to_the_last_bit(kind: str, keep: str, dtype: torch.dtype) -> None:
    """Also for NaN, infinities and at t; with a number, one per channel, and one that is computed."""
    x = special(3).to(dtype)

    class Thresholds(nn.Module):
        def forward(self, x: Tensor, computed: Tensor) -> list[Tensor]:
            limits = [torch.tensor(T), torch.tensor([T, T2, 0.5]), computed]
            more = [[t * 2] if kind == "firm" else [] for t in limits]
            return [SHRINK(x, t, kind, keep, *m) for t, m in zip(limits, more)]

    computed = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.1
    compiled = thresher.compile(Thresholds(), (x, computed), passes="none", validate="off")
    for wanted, found in zip(Thresholds()(x, computed), compiled(x, computed)):
        if kind == "firm" or (kind == "garrote"):  # a multiplication and a subtraction may become one operation
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)
        else:
            assert same(wanted, found)


def test_one_threshold_is_one_rewrite() -> None:
    """What it was made of is not looked at again."""
    _, record = canonical(lambda x: F.relu(x - T) - F.relu(-x - T), torch.randn(4, 9))
    assert [n.message for n in record.rewrites] == ["written as thresher::shrink (soft)"]


def test_what_may_be_negative_is_seen() -> None:
    """A difference is not the sum of what it is made of."""

    def function(x: Tensor) -> Tensor:
        t = torch.add(x.abs().mean(-1, keepdim=True), x.abs().amax(-1, keepdim=True), alpha=-1)
        return x - torch.clamp(x, -t, t)

    program, record = canonical(function, torch.randn(4, 9))
    assert not list(program.calls(SHRINK)) and any("may be negative" in n.message for n in record.refusals)


BEFORE = """\
program model {
  %x = input : f32[2, 5]
  %clamped = aten.clamp.default(%x, -0.5, 0.5) : f32[2, 5]
  %y = aten.sub.Tensor(%x, %clamped) : f32[2, 5]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 5]
  %y_t = constant "y_t" : f32[]
  %shrink = thresher.shrink.default(%x, %y_t, 'soft', 'nle') : f32[2, 5]
  return [%shrink]
}
"""


def test_before_and_after() -> None:
    check_rewrite("canonicalize-threshold", BEFORE, AFTER)


REFUSALS = [
    (
        "a soft threshold that may be negative has no single meaning",
        lambda: (Function(lambda x: x - x.minimum(x.mean()).maximum(-x.mean())), torch.randn(4, 9)),
    ),
    (
        "it is no threshold at its breakpoints, or for NaN and infinities",
        lambda: (Function(lambda x: torch.where((x > T) | (x <= -T), x, 0.0)), torch.randn(4, 9)),
    ),
    (
        "0 between * and *, and no threshold: not symmetric, or scaled",
        lambda: (Function(lambda x: x - x.clamp(-0.3, 0.4)), torch.randn(4, 9)),
    ),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("canonicalize-threshold", sentence, build, ("evaluate-constants", "simplify"))
