"""The arguments of calls by name, with the defaults of the operator's schema where a call has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of the schema of a call by name, in its order; ``node.target`` is an operator of torch's."""
    bound = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if not argument.kwarg_only and index < len(node.args):
            bound[argument.name] = node.args[index]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def has_schema(node: fx.Node) -> bool:
    """Return whether a node is the call of one overload of an operator, which says what its arguments are."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
