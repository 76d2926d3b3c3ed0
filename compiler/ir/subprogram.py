"""Cut some calls out of a program, as a program of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree
from torch import fx

from thresher.ir.nodes import is_tensor
from thresher.ir.program import Program


def extract_subprogram(
    program: Program, outputs: Sequence[fx.Node], values: dict[fx.Node, Any], inside: set[fx.Node] | None = None
) -> Program:
    """Return a program that computes the nodes ``outputs`` by the calls ``inside`` (default: all that they need).

    What these calls read besides becomes an input of the new program; ``values`` gives its value for the probe.
    """
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
