"""Which operator is lowered wrongly: each one is lowered alone, on the values it sees in the whole program."""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, fx

from thresher.backends.base import Backend
from thresher.compiled import check_outputs
from thresher.errors import BackendError
from thresher.program import Program, is_tensor, module_path, source_line


def first_wrong_operator(program: Program, backend: Backend, target: str) -> str:
    """A sentence naming the first operator of ``program`` whose lowering alone differs from torch, or an empty string."""
    values: dict[fx.Node, Any] = {}
    program.run(*program.probe, watch=lambda node, value: values.__setitem__(node, value))
    for node in program.calls():
        if not is_tensor(node):
            continue
        alone, inputs = isolate(program, node, values)
        try:
            outputs = backend.lower(alone, target).run([v for v in inputs if isinstance(v, Tensor)])
        except BackendError as error:
            return f"{node.name} cannot be lowered alone: {error}"
        check = check_outputs(node.name, [values[node]], outputs)
        if not check.passed:
            return f"{node.name} ({node.target}, module {module_path(node)}), error {check.error:.2e} {source_line(node)}".rstrip()
    return ""


def isolate(program: Program, node: fx.Node, values: dict[fx.Node, Any]) -> tuple[Program, list[Any]]:
    """A program that computes ``node`` only, with what it reads as inputs, and those inputs."""
    graph, mapping, inputs = fx.Graph(), {}, []
    constants: dict[str, Tensor] = {}
    for source in node.all_input_nodes:
        if source.op == "get_attr":
            mapping[source] = graph.node_copy(source)
            constants[source.target] = program.constants[source.target]
        else:
            mapping[source] = graph.placeholder(source.name)
            mapping[source].meta.update(source.meta)
            inputs.append(values[source])
    result = graph.node_copy(node, lambda n: mapping[n])
    graph.output((result,))
    in_spec = pytree.tree_flatten((tuple(inputs), {}))[1]
    return Program(graph, constants, in_spec, pytree.tree_flatten((0,))[1], tuple(inputs), node.name), inputs
