"""The memory that a program needs beside its weights when its operators run one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Peak:
    """The most bytes that values live at one time take; ``node`` is computed then, ``largest`` the largest of these values.

    Both nodes are None in a program without calls.
    """

    bytes: int
    node: fx.Node | None = None
    largest: fx.Node | None = None


def peak_bytes(program: Program) -> int:
    """Return the most bytes that values live at one time take, inputs included, as :func:`peak_of` counts them."""
    return peak_of(program).bytes


def peak_of(program: Program, wide: bool = False) -> Peak:
    """Return the most that values live at one time take, inputs included, if each value is freed after its last use.

    Results of operators that only view an argument take nothing. Dynamic dimensions count with the sizes of the example. ``wide``: as in
    a reference run, in which every floating value is float64, and so is a copy of every weight while it is in use.
    """
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        views = node.target in VIEWS and is_tensor(node.args[0]) and (wide or node.args[0].op != "get_attr")
        owner[node] = owner[node.args[0]] if views else node
        for source in node.all_input_nodes:
            last[owner[source]] = node
    ending: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        ending.setdefault(user, []).append(value)
    live = {n: bytes_of(n, wide) for n in program.placeholders}
    total = sum(live.values())
    peak = Peak(total)
    for node in program.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        if owner[node] is node:
            live[node] = bytes_of(node, wide)
            total += live[node]
            if total > peak.bytes:
                peak = Peak(total, node, max(live, key=live.__getitem__))
        for value in [*ending.get(node, ()), *([] if node in last or owner[node] is not node else [node])]:
            total -= live.pop(value, 0)
    return peak


def bytes_of(node: fx.Node, wide: bool = False) -> int:
    """Return the bytes of a value; those of a weight count only in a run that copies it, those of several results with their parts."""
    if not is_tensor(node) or (node.op == "get_attr" and not wide):
        return 0
    dtype = dtype_of(node)
    return math.prod(sizes(node)) * (8 if wide and dtype.is_floating_point else dtype.itemsize)
