"""The listing of a program for the report: every call with its weights, and its differences from the same call on the other side."""

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
    """One call, or an input of the model.

    Attributes:
        inputs: names of the lines that it reads.
        shape: sizes of the first result, as text, for a free size is a symbol.
        weights: shapes of the constants with two dimensions or more that it reads.
        mark: its difference from the other side; ``gone`` only before, ``new`` only after.
        other: ``shape`` and ``weights`` of the same line on the other side, where they differ.
    """

    name: str
    operator: str
    module: str
    inputs: list[str]
    shape: list[str]
    weights: list[list[int]]
    mark: Mark = "kept"
    other: dict[str, Any] = field(default_factory=dict)


def graph_lines(program: Program) -> list[Line]:
    """Return a line for every input and call of ``program``, in the order in which they are computed."""
    constant: set[fx.Node] = set()  # constants, and what is made of nothing else: a masked weight
    lines = []
    for node in program.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op in ("placeholder", "call_function"):
            sources = node.all_input_nodes
            if sources and constant.issuperset(sources):
                constant.add(node)
            lines.append(_line(node, [] if node in constant else [n for n in sources if n in constant]))
    return lines


def _line(node: fx.Node, constants: Sequence[fx.Node]) -> Line:
    sources = [n.name for n in node.all_input_nodes if n.op != "get_attr"]
    weights = [list(shape_of(n)) for n in constants if is_tensor(n) and len(shape_of(n)) > 1]
    name = "input" if node.op == "placeholder" else operator_name(node.target).removeprefix("aten.")
    return Line(node.name, name.removesuffix(".default"), module_path(node), sources, _shape(node), weights)


def _shape(node: fx.Node) -> list[str]:
    """Return the sizes of the result, of the first one where there are several."""
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return [str(d) for d in first.shape] if isinstance(first, Tensor) else []


def mark_differences(before: Sequence[Line], after: Sequence[Line]) -> None:
    """Set ``mark`` and ``other`` of the lines of both sides.

    Two lines match if their names and operators are equal; else if each is the only unmatched line with weights of the same module.
    """
    pairs = {(b.name, b.operator): b for b in before}
    matched = [(pairs.pop((a.name, a.operator)), a) for a in after if (a.name, a.operator) in pairs]
    matched += _matched_by_module(*(_unmatched(lines, matched) for lines in (before, after)))
    for line in (*before, *after):
        line.mark = "kept"
    for line in _unmatched(before, matched):
        line.mark = "gone"
    for line in _unmatched(after, matched):
        line.mark = "new"
    for b, a in matched:
        if (b.shape, b.weights) != (a.shape, a.weights):
            b.mark = a.mark = "changed"
            b.other, a.other = ({"shape": s.shape, "weights": s.weights} for s in (a, b))


def _unmatched(lines: Sequence[Line], matched: Sequence[tuple[Line, Line]]) -> list[Line]:
    matched_ids = {id(line) for pair in matched for line in pair}
    return [line for line in lines if id(line) not in matched_ids]


def _matched_by_module(before: Sequence[Line], after: Sequence[Line]) -> list[tuple[Line, Line]]:
    sole = _sole_weighted_lines(before)
    return [(sole[module], line) for module, line in _sole_weighted_lines(after).items() if module in sole]


def _sole_weighted_lines(lines: Sequence[Line]) -> dict[str, Line]:
    """Return by module the line with weights, where a module has exactly one."""
    weighted = [line for line in lines if line.weights]
    count = Counter(line.module for line in weighted)
    return {line.module: line for line in weighted if count[line.module] == 1}
