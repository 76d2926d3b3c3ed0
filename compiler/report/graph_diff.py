"""A program line by line, for the report: every call with its weights, and what became of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx

from thresher.ir.nodes import is_tensor, module_path, shape_of
from thresher.ir.printer import operator_name
from thresher.ir.program import Program

Mark = Literal["kept", "changed", "gone", "new"]


@dataclass
class Line:
    """One call. ``inputs``: names of the lines it reads; ``weights``: shapes of what it reads that is constant and has two dimensions or
    more; ``other``: shape and weights of the same line on the other side, where they are others there."""

    name: str
    operator: str
    module: str
    inputs: list[str]
    shape: list[str]
    weights: list[list[int]]
    mark: Mark = "kept"
    other: dict[str, Any] = field(default_factory=dict)


def graph_lines(program: Program) -> list[Line]:
    """The inputs and the calls, in the order in which they are computed."""
    computed: set[fx.Node] = set()  # constants, and what is made of nothing else: a masked weight
    found = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            computed.add(node)
        elif node.op in ("placeholder", "call_function"):
            sources = node.all_input_nodes
            if sources and computed.issuperset(sources):
                computed.add(node)
            found.append(_line(node, [] if node in computed else [n for n in sources if n in computed]))
    return found


def _line(node: fx.Node, constants: Sequence[fx.Node]) -> Line:
    sources = [n.name for n in node.all_input_nodes if n.op != "get_attr"]
    weights = [list(shape_of(n)) for n in constants if is_tensor(n) and len(shape_of(n)) > 1]
    name = "input" if node.op == "placeholder" else operator_name(node.target).removeprefix("aten.")
    return Line(node.name, name.removesuffix(".default"), module_path(node), sources, _shape(node), weights)


def _shape(node: fx.Node) -> list[str]:
    """Of the first result, where there are several."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return [str(d) for d in first.shape] if isinstance(first, Tensor) else []


def mark_differences(before: Sequence[Line], after: Sequence[Line]) -> None:
    """Mark the lines of both sides: what is the same, what is smaller or larger, what is gone and what is new.

    A line is the same where name and operator are; else where a module has one line with weights left over on each side.
    """
    pairs = {(b.name, b.operator): b for b in before}
    matched = [(pairs.pop((a.name, a.operator)), a) for a in after if (a.name, a.operator) in pairs]
    found = {id(line) for pair in matched for line in pair}
    left = _only_in_module([b for b in before if id(b) not in found])
    matched += [
        (left[module], a)
        for module, a in _only_in_module([a for a in after if id(a) not in found]).items()
        if module in left
    ]
    found = {id(line) for pair in matched for line in pair}
    for line in before:
        line.mark = "kept" if id(line) in found else "gone"
    for line in after:
        line.mark = "kept" if id(line) in found else "new"
    for b, a in matched:
        if (b.shape, b.weights) != (a.shape, a.weights):
            b.mark = a.mark = "changed"
            b.other, a.other = ({"shape": s.shape, "weights": s.weights} for s in (a, b))


def _only_in_module(given: Sequence[Line]) -> dict[str, Line]:
    """The lines with weights that are the only ones of their module."""
    heavy = [line for line in given if line.weights]
    count = Counter(line.module for line in heavy)
    return {line.module: line for line in heavy if count[line.module] == 1}
