"""Maps of movements: facts that pass through dimension by dimension are what the operator itself says, element by element."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from thresher.analysis.slices.transfer.base import evaluate
from thresher.analysis.slices.transfer.maps import map_of

aten = torch.ops.aten
CALLS = [
    (aten.permute.default, ([2, 3, 4],), ([2, 0, 1],)),
    (aten.reshape.default, ([2, 6, 4],), ([3, 4, 4],)),
    (aten.reshape.default, ([2, 12],), ([2, 3, 2, 2],)),
    (aten.expand.default, ([1, 3, 1],), ([2, 3, 4],)),
    (aten.expand.default, ([1, 1],), ([3, 2],)),
    (aten.slice.Tensor, ([5, 4],), (0, 1, 4)),
    (aten.select.int, ([5, 4],), (0, 3)),
    (aten.flip.default, ([3, 4],), ([1],)),
    (aten.roll.default, ([3, 4], [3, 4]), ([1], [1])),
    (aten.repeat.default, ([2, 3],), ([2, 2],)),
    (aten.pixel_shuffle.default, ([1, 8, 2, 3],), (2,)),
    (aten.pixel_unshuffle.default, ([1, 2, 4, 4],), (2,)),
    (aten.cat.default, ([2, 3], [2, 1], [2, 4]), (1,)),
    (aten.cat.default, ([2, 3], "again", [2, 4], "again"), (1,)),
    (aten.stack.default, ([2, 3], [2, 3]), (1,)),
    (aten.reshape.default, ([],), ([],)),
    (aten.reshape.default, ([1],), ([],)),
]


def call(index: int) -> tuple[fx.Node, list[fx.Node]]:
    target, shapes, rest = CALLS[index]
    graph, operands = fx.Graph(), []
    listed = []
    for shape in shapes:
        if shape == "again":
            listed.append(operands[0])
            continue
        operands.append(graph.placeholder(f"x{len(operands)}"))
        operands[-1].meta["val"] = torch.empty(shape)
        listed.append(operands[-1])
    joins = target in (aten.cat.default, aten.stack.default)
    node = graph.call_function(target, (listed, *rest) if joins else (operands[0], *rest))
    node.meta["val"] = evaluate(node, {n: n.meta["val"] for n in operands})
    return node, list(dict.fromkeys(operands)) if joins else operands[:1]


def narrow(shape: torch.Size, seed: int) -> Tensor:
    """A random fact that varies along some dimensions."""
    generator = torch.Generator().manual_seed(seed)
    kept = [s if bool(torch.rand((), generator=generator) < 0.6) else 1 for s in shape]
    return torch.rand(kept, generator=generator) < 0.5


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(CALLS) - 1), st.integers(0, 10_000))
def test_facts_pass_as_the_operator_moves(index: int, seed: int) -> None:
    node, operands = call(index)
    found = map_of(node, operands, {})
    facts = [narrow(n.meta["val"].shape, seed + i) for i, n in enumerate(operands)]
    wanted = narrow(node.meta["val"].shape, seed + 7)
    counts = [math.prod(n.meta["val"].shape) for n in operands]
    numbers = [p.reshape(n.meta["val"].shape) for p, n in zip(torch.arange(sum(counts)).split(counts), operands)]
    source = evaluate(node, dict(zip(operands, numbers)))
    read = torch.zeros(sum(counts), dtype=torch.bool)
    read[source[wanted.expand(source.shape)]] = True
    if not found.exact:
        assert node.target is aten.cat.default and len(node.args[0]) > len(operands)
        return
    whole = evaluate(node, {n: f.expand(n.meta["val"].shape) for n, f in zip(operands, facts)})
    assert torch.equal(found.forward(facts).expand(whole.shape), whole)
    for argument, n, part in zip(found.arguments, operands, read.split(counts)):
        assert torch.equal(argument.backward(wanted).expand(n.meta["val"].shape), part.reshape(n.meta["val"].shape))
