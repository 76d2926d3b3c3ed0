"""Patterns: all orders are tried, defaults are arguments, several results, no overlap, and errors in the words of the author."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.modules import Function
from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.rewriting.pattern import match_at, matches

aten = torch.ops.aten
A, B = torch.randn(3, 4), torch.randn(3, 4)


def program(function: Callable[..., object], *args: Tensor) -> Program:
    return capture(Function(function), args or (A, B))


def test_both_orders_with_backtracking() -> None:
    """The first order of the product fits alone, and only the second together with the sum."""

    def pattern(x: Tensor, y: Tensor) -> Tensor:
        return aten.add.Tensor(aten.mul.Tensor(x, y), x)

    for function in (lambda a, b: b * a + a, lambda a, b: a * b + a, lambda a, b: a + b * a, lambda a, b: a + a * b):
        (match,) = matches(program(function), pattern)
        assert (match.bound["x"].name, match.bound["y"].name) == ("inputs_0", "inputs_1") and len(match.inner) == 2
    assert not list(matches(program(lambda a, b: a * a + b), pattern))


def test_one_parameter_is_one_value_and_literals_are_literals() -> None:
    square = lambda x: aten.mul.Tensor(x, x)  # noqa: E731
    assert len(list(matches(program(lambda a, b: a * a + a * b), square))) == 1
    power = lambda x, n: aten.pow.Tensor_Scalar(x, n)  # noqa: E731
    (match,) = matches(program(lambda a, b: a**3 + b), power)
    assert match.bound["n"] == 3
    cube = lambda x: aten.pow.Tensor_Scalar(x, 3)  # noqa: E731
    assert match_at(match.anchor, cube) is not None
    assert not list(matches(program(lambda a, b: a**2 + b), cube))


def test_an_argument_that_is_left_out_has_its_default() -> None:
    total = lambda x: aten.sum.dim_IntList(x, [1])  # noqa: E731
    written_out = lambda x: aten.sum.dim_IntList(x, [1], False)  # noqa: E731
    kept = lambda x: aten.sum.dim_IntList(x, [1], True)  # noqa: E731
    plain, keepdim = program(lambda a: a.sum(1), A), program(lambda a: a.sum(1, keepdim=True), A)
    for graph, wanted in ((plain, [1, 1, 0]), (keepdim, [0, 0, 1])):
        assert [len(list(matches(graph, p))) for p in (total, written_out, kept)] == wanted


def test_a_scaled_sum_has_one_order() -> None:
    plus = lambda x, y: aten.add.Tensor(aten.relu.default(x), y)  # noqa: E731
    scaled = lambda x, y: aten.add.Tensor(aten.relu.default(x), y, alpha=2)  # noqa: E731
    graph = program(lambda a, b: torch.add(a.relu(), b, alpha=2))
    assert not list(matches(graph, plus)) and len(list(matches(graph, scaled))) == 1
    turned = program(lambda a, b: torch.add(b, a.relu(), alpha=2))
    assert not list(matches(turned, scaled)) and not list(matches(turned, plus))


def test_no_node_inside_is_read_from_outside() -> None:
    def both(a: Tensor) -> tuple[Tensor, Tensor]:
        negative = a.neg()
        return negative.relu(), negative * 2

    pattern = lambda x: aten.relu.default(aten.neg.default(x))  # noqa: E731
    assert list(matches(program(lambda a: a.neg().relu(), A), pattern))
    assert not list(matches(program(both, A), pattern))


def test_matches_share_no_node() -> None:
    negations = lambda x: aten.neg.default(aten.neg.default(x))  # noqa: E731
    found = list(matches(program(lambda a: a.neg().neg().neg().neg().neg(), A), negations))
    assert len(found) == 2 and not found[0].inner & found[1].inner


def sine_and_cosine(x: Tensor) -> tuple[Tensor, Tensor]:
    return aten.sin.default(x), aten.cos.default(x)


def test_several_results() -> None:
    (match,) = matches(program(lambda a, b: (a.sin() * b, a.cos())), sine_and_cosine)
    assert [n.name for n in match.anchors] == ["sin", "cos"] and match.anchor is match.anchors[0]
    assert not list(matches(program(lambda a, b: a.sin() * b.cos()), sine_and_cosine))  # of two values
    found = list(matches(program(lambda a, b: a.sin() + a.cos() + b.sin() + b.cos()), sine_and_cosine))
    assert [m.bound["x"].name for m in found] == ["inputs_0", "inputs_1"]


def test_several_results_that_no_call_can_replace_at_once() -> None:
    """One of them depends on the other, by a call that stays."""
    both = lambda x, y: (aten.sin.default(x), aten.cos.default(y))  # noqa: E731
    assert not list(matches(program(lambda a: a.sin().exp().cos(), A), both))


def test_one_of_the_results_of_a_call() -> None:
    largest = lambda x: aten.topk.default(x, 2)[0]  # noqa: E731
    assert len(list(matches(program(lambda a: a.topk(2)[0] * 1.5, A), largest))) == 1
    assert not list(matches(program(lambda a: a.topk(2)[1] * 2, A), largest))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda x: torch.relu(x), r"calls torch.relu, which is in no program; write torch.ops.aten.relu.default"),
        (lambda x: aten.relu(x), r"calls torch.ops.aten.relu, .*write torch.ops.aten.relu.default"),
        (lambda x, y: x * y, r"calls operator.mul, .*write torch.ops.aten.mul.Tensor or torch.ops.aten.mul.Scalar"),
        (lambda x: x.relu(), r"has .relu, which is in no program; write a call of torch.ops.aten"),
        (lambda x: x, r"returns Proxy\(x\); it must return the result of a call"),
        (lambda x: None, "returns None; it must return the result of a call"),
        (lambda x: (), "it must return the result of a call, or a tuple of them"),
        (lambda x, y: aten.relu.default(x), "does not use y"),
        (lambda x: [aten.relu.default(x), aten.exp.default(x)][0], "does not use exp_default"),
        (lambda x: aten.relu.default(x) if x > 0 else x, "cannot be traced: TraceError"),
    ],
)  # fmt: skip
def test_a_pattern_that_can_never_match_is_refused(pattern: Callable, message: str) -> None:
    with pytest.raises(PassError, match=message):
        list(matches(program(lambda a: a.relu(), A), pattern))
