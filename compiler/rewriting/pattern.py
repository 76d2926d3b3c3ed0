"""Match patterns that are written like ordinary code.

A pattern is ordinary Python over ATen calls; it is traced once. A search walks backward from each node that could be its result. A
parameter matches any node or literal, the same one wherever it is used again. Sums and products match in both orders, and all orders
are tried. An argument that the pattern leaves out must have its default. A pattern may return several values.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from thresher.errors import PassError
from thresher.ir.arguments import bound_arguments, has_schema
from thresher.ir.program import Program

aten = torch.ops.aten
#: Their first two arguments may be exchanged, where the second has no factor (``alpha``).
COMMUTATIVE = {
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.logical_and.default, aten.logical_or.default,
    aten.logical_xor.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.eq.Tensor, aten.ne.Tensor,
}  # fmt: skip
Bound = dict[fx.Node, Any]


@dataclass(frozen=True)
class Match:
    """A match of a pattern.

    Attributes:
        anchors: the nodes that are replaced, one for each value that the pattern returns.
        bound: what each parameter stands for, by name.
        inner: all nodes that are matched by calls of the pattern, the anchors among them.
    """

    anchors: tuple[fx.Node, ...]
    bound: dict[str, Any]
    inner: frozenset[fx.Node]

    @property
    def anchor(self) -> fx.Node:
        """The node that is replaced, or the first of them."""
        return self.anchors[0]


def matches(program: Program, pattern: Callable) -> Iterator[Match]:
    """Yield matches of ``pattern`` in ``program``, in graph order, no two of which share a node. Do not edit the graph while iterating.

    Raises :class:`PassError` for a pattern that no program can match, with the cure.
    """
    taken: set[fx.Node] = set()
    for node in program.calls(_trace(pattern)[0].target):
        match = next((m for m in _matches_at(node, pattern) if not m.inner & taken), None)
        if match is not None:
            taken |= match.inner
            yield match


def match_at(node: fx.Node, pattern: Callable) -> Match | None:
    """Return a match of ``pattern`` whose (first) result is ``node``, or None. Raises :class:`PassError` as :func:`matches` does."""
    return next(_matches_at(node, pattern), None)


def _matches_at(node: fx.Node, pattern: Callable) -> Iterator[Match]:
    roots = _trace(pattern)
    for bound in _results(roots, node):
        inner = frozenset(v for k, v in bound.items() if k.op == "call_function")
        anchors = tuple(bound[root] for root in roots)
        read = any(user not in inner for n in inner.difference(anchors) for user in n.users)
        if not read and not (len(anchors) > 1 and _leaves_and_returns(inner)):
            yield Match(anchors, {k.name: v for k, v in bound.items() if k.op == "placeholder"}, inner)


def _results(roots: tuple[fx.Node, ...], node: fx.Node) -> Iterator[Bound]:
    """Yield what makes the roots equal to ``node`` and to other nodes of its graph."""
    others = [[n for n in node.graph.nodes if n.target == root.target] for root in roots[1:]]
    for nodes in itertools.product([node], *others):
        if len(set(nodes)) == len(nodes):
            yield from _match_all(list(zip(roots, nodes)), {})


def _leaves_and_returns(inner: frozenset[fx.Node]) -> bool:
    """Return whether a node outside reads one of ``inner`` and another one depends on it: then there is no place for a new call."""
    outside = {user for n in inner for user in n.users} - inner
    last = max(inner)
    while outside:
        node = outside.pop()
        if node in inner:
            return True
        outside |= {user for user in node.users if user <= last}
    return False


# ---------------------------------------------------------------------- matching


def _match(pattern: Any, value: Any, bound: Bound) -> Iterator[Bound]:
    """Yield ``bound`` extended by what makes ``pattern`` equal ``value``, in each way that there is."""
    if not isinstance(pattern, fx.Node):
        if _equal_literals(pattern, value):
            yield bound
    elif pattern in bound:
        if _equal_literals(bound[pattern], value):
            yield bound
    elif pattern.op == "placeholder":
        yield {**bound, pattern: value}
    elif isinstance(value, fx.Node) and value.op == "call_function" and value.target == pattern.target:
        for pairs in _orders(pattern, value):
            yield from _match_all(pairs, {**bound, pattern: value})


def _match_all(pairs: list[tuple[Any, Any]], bound: Bound) -> Iterator[Bound]:
    if not pairs:
        yield bound
        return
    (pattern, value), *rest = pairs
    for extended in _match(pattern, value, bound):
        yield from _match_all(rest, extended)


def _orders(pattern: fx.Node, value: fx.Node) -> Iterator[list[tuple[Any, Any]]]:
    """Yield the arguments of the two calls side by side, as they stand and, where that is the same, exchanged."""
    if not has_schema(pattern):
        yield list(zip(pattern.args, value.args, strict=True))
        return
    wanted, actual = list(bound_arguments(pattern).values()), bound_arguments(value)
    yield list(zip(wanted, actual.values()))
    if value.target in COMMUTATIVE and actual.get("alpha", 1) == 1:
        first, second, *rest = actual.values()
        yield list(zip(wanted, (second, first, *rest)))


def _equal_literals(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal_literals(x, y) for x, y in zip(a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return a == b


# ---------------------------------------------------------------------- tracing


def forget_patterns() -> None:
    """Trace each pattern anew when it is asked for next: which lines a pass runs must not depend on what ran before."""
    _trace.cache_clear()


@functools.cache
def _trace(pattern: Callable) -> tuple[fx.Node, ...]:
    """Return the nodes that the pattern returns. Raises :class:`PassError` where no program can match it."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    name = getattr(pattern, "__name__", str(pattern))
    proxies = [fx.Proxy(graph.placeholder(p), tracer) for p in inspect.signature(pattern).parameters]
    try:
        returned = pattern(*proxies)
    except Exception as error:
        raise PassError(f"the pattern {name} cannot be traced: {type(error).__name__}: {error}") from error
    for node in graph.nodes:
        if node.op == "call_function" and not has_schema(node) and node.target is not operator.getitem:
            raise PassError(
                f"the pattern {name} calls {_called(node.target)}, which is in no program; {_cure(node.target)}"
            )
        if node.op in ("call_method", "call_module", "get_attr"):
            raise PassError(
                f"the pattern {name} has .{node.target}, which is in no program; write a call of torch.ops.aten"
            )
    results = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    if not results or not all(isinstance(r, fx.Proxy) and r.node.op == "call_function" for r in results):
        raise PassError(
            f"the pattern {name} returns {returned!r}; it must return the result of a call, or a tuple of them"
        )
    roots = tuple(r.node for r in results)
    unread = [n.name for n in graph.nodes if not n.users and n not in roots]
    if unread:
        raise PassError(f"the pattern {name} does not use {', '.join(unread)}: what it stands for would be anything")
    return roots


def _called(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverloadPacket):
        return f"torch.ops.{str(target).replace('::', '.')}"
    return f"{getattr(target, '__module__', '').removeprefix('_').removesuffix('._C')}.{getattr(target, '__name__', target)}"


def _cure(target: Any) -> str:
    """Return what to write instead: the overloads of an operator of that name."""
    name = getattr(target, "__name__", "").strip("_") if not isinstance(target, torch._ops.OpOverloadPacket) else ""
    packet = (
        target
        if isinstance(target, torch._ops.OpOverloadPacket)
        else getattr(aten, {"truediv": "div"}.get(name, name), None)
    )
    if packet is None:
        return "write a call of torch.ops.aten"
    space = str(packet).replace("::", ".")
    overloads = [o for o in packet.overloads() if not o.endswith("out")]
    return "write " + " or ".join(f"torch.ops.{space}.{o}" for o in overloads[:3])
