"""What is known of elementwise results is what all values of the unknown operands agree in, element by element."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from helpers.modules import Function
from thresher.analysis.slices.channels import known_facts
from thresher.analysis.slices.facts import Known
from thresher.analysis.slices.operators import rule_of
from thresher.frontend.capture import capture

UNKNOWN = None
VALUES = [0.0, 1.5, -torch.inf, UNKNOWN]


def fact(elements: list, like: Tensor) -> Known:
    mask = torch.tensor([e is not UNKNOWN for e in elements])
    return Known(mask, torch.tensor([0 if e is UNKNOWN else e for e in elements], dtype=like.dtype))


@given(
    st.lists(st.tuples(st.sampled_from([False, True, UNKNOWN]), *[st.sampled_from(VALUES)] * 2), min_size=1, max_size=6)
)
@settings(max_examples=40, deadline=None)
def test_where(elements: list[tuple]) -> None:
    size = len(elements)
    args = (torch.ones(size, dtype=torch.bool), torch.randn(size), torch.randn(size))
    program = capture(Function(torch.where), args)
    (node,) = program.calls(torch.ops.aten.where.self)
    facts: dict[fx.Node, Known] = known_facts(program)
    facts |= {n: fact(list(column), value) for n, column, value in zip(node.args, zip(*elements), args)}
    result = rule_of(node).forward(node, facts)
    for index, (condition, a, b) in enumerate(elements):
        conditions = [False, True] if condition is UNKNOWN else [condition]
        operands = [[7.0, 8.0] if v is UNKNOWN else [v] for v in (a, b)]
        possible = {x if c else y for c, x, y in itertools.product(conditions, *operands)}
        mask = result is not None and bool(result.mask.expand(size)[index])
        assert mask == (len(possible) == 1)
        if mask:
            assert result.content.expand(size)[index].item() == possible.pop()
