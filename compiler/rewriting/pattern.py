"""Match patterns that are written like ordinary code.

A rule's ``pattern`` is ordinary Python over ATen calls; it is traced once. ``match`` walks backward from each node that could
be the pattern's result. A pattern parameter matches any node or literal, the same one wherever it is used again; addition and
multiplication match in both orders; inner nodes must have no users outside the match (else the rewrite would compute them twice).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.ir.program import Program

aten = torch.ops.aten
COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.logical_and.default}


@dataclass(frozen=True)
class Match:
    """A match of a pattern: its anchor (the node that is replaced), the values of its parameters, and the nodes inside."""

    anchor: fx.Node
    bound: dict[str, Any]
    inner: frozenset[fx.Node]


@functools.cache
def _trace(pattern: Callable) -> fx.Graph:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(name), tracer) for name in inspect.signature(pattern).parameters]
    graph.output(pattern(*proxies).node)
    return graph


def matches(program: Program, pattern: Callable) -> Iterator[Match]:
    """Yield every match of ``pattern`` in ``program``, in graph order. Do not edit the graph while iterating."""
    root: fx.Node = next(n for n in reversed(_trace(pattern).nodes) if n.op == "output").args[0]
    for node in program.calls(root.target):
        match = match_at(node, pattern)
        if match is not None:
            yield match


def match_at(node: fx.Node, pattern: Callable) -> Match | None:
    """Return the match of ``pattern`` whose result is ``node``, or None."""
    root: fx.Node = next(n for n in reversed(_trace(pattern).nodes) if n.op == "output").args[0]
    bound = _match(root, node, {})
    if bound is None:
        return None
    inner = frozenset(v for k, v in bound.items() if k.op == "call_function")
    if any(user not in inner for n in inner if n is not node for user in n.users):
        return None
    return Match(node, {k.name: v for k, v in bound.items() if k.op == "placeholder"}, inner)


def _match(pattern: Any, value: Any, bound: dict[fx.Node, Any]) -> dict[fx.Node, Any] | None:
    """Return ``bound`` extended by what makes ``pattern`` equal ``value``, or None."""
    if not isinstance(pattern, fx.Node):
        return bound if _equal_literals(pattern, value) else None
    if pattern in bound:
        return bound if bound[pattern] is value or _equal_literals(bound[pattern], value) else None
    if pattern.op == "placeholder":
        return {**bound, pattern: value}
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target is not pattern.target:
        return None
    if value.kwargs.keys() != pattern.kwargs.keys() or len(value.args) != len(pattern.args):
        return None
    bound = {**bound, pattern: value}
    orders = [value.args, value.args[::-1]] if value.target in COMMUTATIVE else [value.args]
    for order in orders:
        result: dict[fx.Node, Any] | None = bound
        for p, v in zip((*pattern.args, *pattern.kwargs.values()), (*order, *value.kwargs.values())):
            result = _match(p, v, result) if result is not None else None
        if result is not None:
            return result
    return None


def _equal_literals(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal_literals(x, y) for x, y in zip(a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return a == b
