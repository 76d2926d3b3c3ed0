"""A computation that is written once, as calls, and then done at once on values or inserted into a graph.

``call(operator, *arguments)`` is :func:`at_once` or what :func:`inserter` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from thresher.ir.program import Program

Call = Callable[..., Any]


def at_once(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute the call on values."""
    return target(*args, **kwargs)


def inserter(program: Program, before: fx.Node, like: fx.Node | None = None) -> Call:
    """Return ``call(operator, *arguments)`` that inserts a node before ``before``, with the origin of ``like`` (default: ``before``)."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return program.insert_call(before, target, args, kwargs, like)

    return call
