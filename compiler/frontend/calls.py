"""The calls of a graph of torch's as those of a program: views become reshapes, guards are left out, subgraphs are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from thresher.errors import CaptureError
from thresher.ir.nodes import copy_origin, source_line

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
#: The operators of torch that call a subgraph: what users write for them, and what to write instead.
SUBGRAPH_CURES = {
    "cond": ("torch.cond", "compute both branches and select with torch.where, or branch on a Python bool"),
    "while_loop": (
        "while_loop",
        "write a Python loop over a fixed number of steps, and keep the state of finished samples with torch.where",
    ),
    "scan": ("scan", "write a Python loop over the steps; it is unrolled"),
    "map_impl": ("map", "use torch.vmap, or operators on the whole batch"),
    "flex_attention": (
        "flex_attention",
        "use torch.nn.functional.scaled_dot_product_attention, with what is added to the scores as its attn_mask",
    ),
}
OTHER_CURE = "write its body with operators on whole tensors"


def refuse_subgraphs(module: fx.GraphModule) -> None:
    """Raise :class:`CaptureError` for the first call of ``module`` that runs another graph, with what to write instead."""
    for node in module.graph.nodes:
        if isinstance(node.target, HigherOrderOperator) and _subgraphs(module, node):
            _refuse(module, node)


def _subgraphs(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """Return the graphs that ``node`` calls."""
    graphs = (getattr(module, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr")
    return [graph for graph in graphs if isinstance(graph, fx.GraphModule)]


def _refuse(module: fx.GraphModule, node: fx.Node) -> NoReturn:
    operator = node.target.name() if isinstance(node.target, HigherOrderOperator) else str(node.target)
    name, cure = SUBGRAPH_CURES.get(operator, (operator, OTHER_CURE))
    # torch keeps the user's line for the calls inside, not for the operator
    lines = [source_line(n) for n in [node, *(n for graph in _subgraphs(module, node) for n in graph.graph.nodes)]]
    line = next(filter(None, lines), "")
    raise CaptureError(
        f"the model calls {name}{f' ({line})' if line else ''}, whose subgraphs a compiled model does not have; {cure}"
    )


def copy_call(graph: fx.Graph, source: fx.Node, new_node: Callable[[fx.Node], Any]) -> fx.Node:
    """Append ``source`` to ``graph`` as a program has it; ``new_node`` gives its arguments there."""
    node = graph.node_copy(source, new_node)
    copy_origin(node, source)
    if node.target in VIEWS:  # strides are the backend's business: a view here is a reshape
        node.target = torch.ops.aten.reshape.default
    if node.target is torch.ops.aten.rms_norm.default:
        _name_epsilon(node)
    return node


def _name_epsilon(node: fx.Node) -> None:
    """Write the eps of rms_norm out: its default is that of the model's dtype, also when a proof runs the program in float64."""
    x, shape, *rest = node.args
    weight = rest[0] if rest else node.kwargs.get("weight")
    eps = rest[1] if len(rest) > 1 else node.kwargs.get("eps")
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    node.args, node.kwargs = (x, shape, weight, eps), {}


def is_assertion(node: fx.Node) -> bool:
    """Return whether ``node`` is a guard of export (shape and range checks): the compiled module checks its inputs itself."""
    name = str(node.target)
    return "_assert" in name or "sym_constrain_range" in name
