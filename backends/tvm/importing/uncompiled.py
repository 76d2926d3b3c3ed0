"""The nodes whose kernels TVM cannot compile: each kind of call is compiled alone, after all of them together have failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from thresher.backends.tvm.plans.plan_selection import workload_of
from thresher.errors import first_line
from thresher.ir.nodes import getitem_users, is_tensor
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram


def uncompiled_nodes(program: Program, compile_program: Callable[[Program], Any], known: set[str]) -> dict[str, str]:
    """Return the names of the nodes that ``compile_program`` fails on when they are alone, each with the reason.

    Nodes in ``known`` are left out; of calls with the same operator, literals and shapes one is tried.
    """
    values = {n: n.meta.get("val") for n in program.graph.nodes}
    reasons: dict[str, str] = {}
    failed: dict[str, str] = {}
    for node in program.calls():
        results = [node] if is_tensor(node) else [n for n in getitem_users(node).values() if is_tensor(n)]
        if node.name in known or not results or _selects(node):
            continue
        workload = workload_of(node, False)
        if workload not in reasons:
            alone = extract_subprogram(program, results, values, {node, *results})
            reasons[workload] = _reason(alone, compile_program)
        if reasons[workload]:
            failed[node.name] = reasons[workload]
    return failed


def _selects(node: fx.Node) -> bool:
    """Return whether a node takes one of several results of another."""
    return any(node in getitem_users(source).values() for source in node.all_input_nodes)


def _reason(alone: Program, compile_program: Callable[[Program], Any]) -> str:
    try:
        compile_program(alone)
    except Exception as error:  # whatever TVM raises
        return first_line(error)
    return ""
