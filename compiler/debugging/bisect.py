"""Which operator is lowered wrongly: each one is lowered alone, on the values it sees in the whole program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from thresher.backends.base import Backend
from thresher.errors import BackendError
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.runtime.comparison import check_outputs


def first_wrong_operator(program: Program, backend: Backend, target: str) -> str:
    """A sentence naming the first operator of ``program`` whose lowering alone differs from torch, or an empty string."""
    values: dict[fx.Node, Any] = {}
    program.run(*program.probe, watch=lambda node, value: values.__setitem__(node, value))
    for node in program.calls():
        if not is_tensor(node):
            continue
        alone = extract_subprogram(program, [node], values, {node})
        try:
            outputs = backend.lower(alone, target).run([v for v in alone.probe if isinstance(v, Tensor)])
        except BackendError as error:
            return f"{node.name} cannot be lowered alone: {error}"
        check = check_outputs(node.name, [values[node]], outputs)
        if not check.passed:
            return f"{node.name} ({node.target}, module {module_path(node)}), error {check.error:.2e} {source_line(node)}".rstrip()
    return ""


def extract_subprogram(
    program: Program, outputs: Sequence[fx.Node], values: dict[fx.Node, Any], inside: set[fx.Node] | None = None
) -> Program:
    """A program that computes some nodes by the calls ``inside`` (default: all that it needs). What they read else are its inputs."""
    needed, todo = set(), list(outputs)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            calls = node.op == "call_function" and (inside is None or node in inside or not is_tensor(node))
            todo += node.all_input_nodes if calls else []
    graph, mapping, probe, constants = fx.Graph(), {}, [], {}
    order = [n for n in program.graph.nodes if n in needed]
    computed = {n for n in order if n.op == "call_function" and (inside is None or n in inside or not is_tensor(n))}
    for node in [n for n in order if n.op != "get_attr" and n not in computed]:  # inputs first
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta.update(node.meta)
        probe.append(values[node])
    for node in [n for n in order if n.op == "get_attr" or n in computed]:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if node.op == "get_attr":
            constants[node.target] = program.constants[node.target]
    graph.output(tuple(mapping[n] for n in outputs))
    in_spec, out_spec = pytree.tree_flatten((tuple(probe), {}))[1], pytree.tree_flatten(tuple(outputs))[1]
    return Program(graph, constants, in_spec, out_spec, tuple(probe), program.name)
