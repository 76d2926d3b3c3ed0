"""The memory that a program needs beside its weights when its operators run one after the other."""

from __future__ import annotations

import torch
from torch import fx

from thresher.analysis.slices.facts import sizes
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program

aten = torch.ops.aten
VIEWS = {
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.t.default, aten.squeeze.dims, aten.unsqueeze.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default, aten.detach.default, aten.alias.default,
}  # fmt: skip


def peak_bytes(program: Program) -> int:
    """Return the most bytes that values live at one time take, inputs included, if each value is freed after its last use.

    Results of operators that only view an argument take nothing. Dynamic dimensions count with the sizes of the example.
    """
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        views = node.target in VIEWS and is_tensor(node.args[0]) and node.args[0].op != "get_attr"
        owner[node] = owner[node.args[0]] if views else node
        for source in node.all_input_nodes:
            last[owner[source]] = node
    peak = live = sum(_bytes(n) for n in program.placeholders)
    ending: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        ending.setdefault(user, []).append(value)
    for node in program.calls():
        if owner[node] is node:
            live += _bytes(node)
            peak = max(peak, live)
        live -= sum(_bytes(value) for value in ending.get(node, ()) if value.op != "get_attr")
        if node not in last and owner[node] is node:  # nobody reads it
            live -= _bytes(node)
    return peak


def _bytes(node: fx.Node) -> int:
    if not is_tensor(node) or node.op == "get_attr":
        return 0
    count = 1
    for size in sizes(node):
        count *= size
    return count * dtype_of(node).itemsize
