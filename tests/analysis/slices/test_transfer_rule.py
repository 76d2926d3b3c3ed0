"""The example in the docstring of ``TransferRule`` is a rule that agrees with the one of the table."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable

import pytest
import torch

from helpers.modules import Function
from thresher.analysis.slices import operators
from thresher.analysis.slices.channels import known_facts
from thresher.analysis.slices.facts import known, sizes
from thresher.analysis.slices.operators import register_rule, rule_of
from thresher.analysis.slices.ties import equal
from thresher.analysis.slices.transfer.base import TransferRule
from thresher.errors import ThresherError
from thresher.frontend.capture import capture
from thresher.ops.define import define

aten = torch.ops.aten


def example() -> TransferRule:
    text = inspect.getdoc(TransferRule) or ""
    code = re.search(r"^    class Permute.*?(?=^\S)", text, flags=re.S | re.M)
    assert code is not None
    names = {"TransferRule": TransferRule, "known": known, "equal": equal, "sizes": sizes}
    exec(textwrap.dedent(code[0]), names)
    return names["Permute"]()


def test_the_example_of_the_docstring() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1)
    program = capture(Function(lambda x: (x * mask).permute(2, 0, -2)), (torch.randn(2, 3, 4),))
    facts = known_facts(program)
    (node,) = program.calls(torch.ops.aten.permute.default)
    rule, reference = example(), rule_of(node)
    mine, its = rule.forward(node, facts), reference.forward(node, facts)
    assert mine is not None and its is not None
    assert torch.equal(mine.mask, its.mask) and torch.equal(mine.content, its.content)
    wanted = torch.tensor([True, False, True, False]).reshape(4, 1, 1)
    (mine_read,), (its_read,) = (r.backward(node, wanted, facts).values() for r in (rule, reference))
    assert torch.equal(mine_read, its_read)
    pairs = [{frozenset(tie.keys) for tie in r.constraints(node, facts)} for r in (rule, reference)]
    assert pairs[0] == pairs[1]


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> torch._ops.OpOverload:
    """A new operator, and a table that forgets what a test registers."""
    monkeypatch.setattr(operators, "TABLE", dict(operators.TABLE))
    if not hasattr(torch.ops.rules, "f"):
        define("rules::f", "(Tensor x) -> Tensor", torch.sin, torch.empty_like)
    return torch.ops.rules.f.default


def test_a_rule_is_registered_and_replaced(operator: torch._ops.OpOverload) -> None:
    register_rule(operator, like=aten.relu.default)
    assert operators.TABLE[operator] is operators.TABLE[aten.relu.default]
    rule = example()
    register_rule(operator, rule)
    assert operators.TABLE[operator] is rule


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda f: (torch.ops.rules.f, example()), "rules.f is no overload; write torch.ops.mine.f.default"),
        (lambda f: (aten.relu.default, example()), "aten.relu.default has a built-in rule"),
        (lambda f: (f,), r"rules.f.default\): give either rule= or like="),
        (lambda f: (f, example(), aten.relu.default), "give either rule= or like="),
        (lambda f: (f, None, f), "like=.: rules.f.default has no rule; docs/operators.md lists"),
        (lambda f: (f, TransferRule), "rule=.*is no TransferRule; give an instance of a subclass"),
    ],
)
def test_what_cannot_be_registered(operator: torch._ops.OpOverload, arguments: Callable, words: str) -> None:
    target, rule, like = (*arguments(operator), None, None)[:3]
    with pytest.raises(ThresherError, match=words):
        register_rule(target, rule, like=like)
    assert operator not in operators.TABLE
