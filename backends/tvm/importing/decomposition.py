"""An operator without a lowering as a graph of others, by torch's own decompositions and references.

torch knows most of its operators in terms of a few: ``torch._decomp`` (which its compilers use), what a composite operator is composed of,
and ``torch._refs`` (which say what an operator means). A few of our own come first. The function is traced on fake tensors, so it is
written for the sizes at hand; free sizes stay free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._decomp
import torch._refs
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from thresher.backends.tvm.importing.own_decompositions import OWN
from thresher.ir.nodes import copy_origin
from thresher.ir.program import Program

MAX_CALLS = 200  # of a decomposition: more are slower than the one call that they stand for


def decomposed(node: fx.Node, program: Program) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return the graph that computes ``node``, whose constants are attributes of the module, and the nodes that are its inputs.

    Raises :class:`NotImplementedError` where torch has no decomposition of the operator, or one that needs the operator itself or more than
    MAX_CALLS others.
    """
    function = _function(node.target)
    sources = node.all_input_nodes

    def on_values(*values: Any) -> Any:
        value_of = dict(zip(sources, values)).__getitem__
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        result = function(*args, **kwargs)
        if result is NotImplemented:
            raise NotImplementedError("there is none for these arguments")
        return result

    # nodes may share one fake tensor as their value, and make_fx knows its inputs by that
    values = [v.detach() if isinstance(v, Tensor) else v for v in (n.meta["val"] for n in sources)]
    with program.fake_mode, torch.no_grad():
        graph_module = make_fx(on_values)(*values)
        if any(map(_writes, graph_module.graph.nodes)):
            graph_module = make_fx(torch.func.functionalize(on_values))(*values)
    calls = [n for n in graph_module.graph.nodes if n.op == "call_function"]
    if any(n.target is node.target for n in calls):
        raise NotImplementedError("its decomposition needs itself")
    if len(calls) > MAX_CALLS:
        raise NotImplementedError(f"its decomposition has {len(calls)} calls")
    for call in calls:
        copy_origin(call, node)
    return graph_module, sources


def _writes(node: fx.Node) -> bool:
    """Return whether a call writes into an argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _function(target: Any) -> Callable[..., Any]:
    """Return torch's definition of an operator in terms of others."""
    if not isinstance(target, torch._ops.OpOverload):
        raise NotImplementedError(f"{target} is no operator of torch's")
    if target in OWN:
        return OWN[target]
    if target in torch._decomp.decomposition_table:
        return torch._decomp.decomposition_table[target]
    if target._can_decompose():
        return target.decompose
    name = target._schema.name.removeprefix("aten::")
    if name in torch._refs.__all__:
        return getattr(torch._refs, name)
    raise NotImplementedError("there is none")
