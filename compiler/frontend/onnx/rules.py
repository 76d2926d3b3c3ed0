"""The table of ONNX operators, RULES, and the nodes that its rules read.

A rule is ``f(node, *inputs)`` and returns what the operator computes: a tensor, or a sequence of them. Inputs are tensors, NumPy arrays
where they depend on no input of the model (sizes, axes, weights), or None. It raises :class:`Unsupported` for a use that it does not cover.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


class Unsupported(Exception):
    """A use of an operator that no rule covers; the message says which."""


@dataclass(frozen=True)
class Node:
    """A node of the file: its attributes, the number of its outputs, the opset, and the function that makes an input a tensor."""

    name: str
    attributes: dict[str, Any]
    outputs: int
    opset: int
    tensor: Callable[[Any], Any]

    @staticmethod
    def of(proto: Any, opset: int, tensor: Callable[[Any], Any]) -> Node:
        """Return the node of an ONNX ``NodeProto``, its attributes as Python values."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        text = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        return Node(proto.name, text, len(proto.output), opset, tensor)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or ``default`` where the file has none."""
        return self.attributes.get(name, default)

    def static(self, value: Any, name: str) -> np.ndarray:
        """Return an input that depends on no input of the model, as an array; raise :class:`Unsupported` for another."""
        if isinstance(value, Tensor):
            raise Unsupported(f"its {name} depends on values, not on shapes")
        return np.asarray(value)

    def numbers(self, name: str, value: Any = None) -> list[int] | None:
        """Return integers that are an attribute in old opsets and the input ``value`` in new ones; None where there are none."""
        if value is not None:
            return [int(v) for v in self.static(value, name).reshape(-1)]
        attribute = self.get(name)
        if attribute is None:
            return None
        return [int(v) for v in ([attribute] if isinstance(attribute, int) else attribute)]


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these operators."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def plain(function: Callable[..., Any]) -> Rule:
    """Return the rule that calls ``function`` with all inputs as tensors; there are no attributes."""
    return lambda node, *values: function(*(node.tensor(v) for v in values))


def folded(function: Callable[[Any, Any], Any]) -> Rule:
    """Return the rule of an operator of any number of inputs, which joins two at a time."""

    def run(node: Node, *values: Any) -> Any:
        result = node.tensor(values[0])
        for value in values[1:]:
            result = function(result, node.tensor(value))
        return result

    return run
