"""Operators that draw random numbers: a compiled model would draw others than the model, so they are refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.errors import CaptureError
from thresher.ir.nodes import source_line

aten = torch.ops.aten
NAMES = {
    aten.rand_like.default: "torch.rand_like",
    aten.randn_like.default: "torch.randn_like",
    aten.native_dropout.default: "dropout",
}
#: The names of arguments that switch the drawing off: a probability that is 0, a mode that is not training.
PROBABILITIES, MODES = ("dropout_p", "dropout", "p"), ("training", "train")


def refuse_random_numbers(graph: fx.Graph) -> None:
    """Raise :class:`CaptureError` naming the first call of ``graph`` that draws random numbers, and its line."""
    for node in graph.nodes:
        if node.op == "call_function" and draws_random_numbers(node):
            line = source_line(node)
            name = NAMES.get(node.target, str(node.target))
            raise CaptureError(
                f"the model draws random numbers by {name}{f' ({line})' if line else ''}, and a compiled model would draw others; "
                "pass them in as an input, or switch off what needs them (dropout: put the module in eval mode)"
            )


def draws_random_numbers(node: fx.Node) -> bool:
    """Return whether two runs of a call may differ."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    values = _arguments(node)
    return not any(values.get(name) == 0 for name in PROBABILITIES) and not any(values.get(n) is False for n in MODES)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the names that the operator's schema has for them, with their defaults."""
    parameters = node.target._schema.arguments
    positional = {p.name: value for p, value in zip(parameters, node.args)}
    return {p.name: p.default_value for p in parameters if p.has_default_value()} | positional | dict(node.kwargs)
