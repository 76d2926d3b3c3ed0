"""The example in the docstring of ``TransferRule`` is a rule that agrees with the one of the table."""

from __future__ import annotations

import inspect
import re
import textwrap

import torch

from helpers.modules import Function
from thresher.analysis.slices.channels import known_facts
from thresher.analysis.slices.facts import known, sizes
from thresher.analysis.slices.operators import rule_of
from thresher.analysis.slices.ties import equal
from thresher.analysis.slices.transfer.base import TransferRule
from thresher.frontend.capture import capture


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
