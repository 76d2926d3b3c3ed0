"""Compute at compile time what does not depend on an input.

Masks of ``torch.nn.utils.prune`` (``weight_orig * mask``), parametrizations, weight norm, gates that are parameters, position
grids, attention masks built from ``arange``: every call whose arguments are all constants becomes a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.pass_manager import Context, Note, Pass, PassResult, register_pass
from thresher.program import Program, dtype_of, is_tensor

aten = torch.ops.aten
#: Of their argument these read the shape only.
FILLED: dict[Any, Callable[[fx.Node], Any]] = {
    aten.zeros_like.default: lambda node: 0,
    aten.ones_like.default: lambda node: 1,
    aten.full_like.default: lambda node: node.args[1],
}
RANDOM = torch.Tag.nondeterministic_seeded


@register_pass
@dataclass(frozen=True)
class EvaluateConstants(Pass):
    """Replace calls on constants by their value."""

    name: ClassVar[str] = "evaluate-constants"
    limit: int = 1 << 24  # a result may have this many elements, or as many as the constants it is made from

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        values: dict[fx.Node, Any] = {}
        same: dict[
            tuple, fx.Node
        ] = {}  # one constant for equal calls: a mask is multiplied anew at each use of its layer
        for node in list(work.graph.nodes):
            if node.op == "get_attr":
                values[node] = work.constants[node.target]
            elif node.op == "call_function" and node.target in FILLED and self.static(node):
                values[node] = torch.full(node.meta["val"].shape, FILLED[node.target](node), dtype=dtype_of(node))
            elif node.op == "call_function" and self.evaluable(node, values):
                first = same.setdefault((node.target, str(node.args), str(node.kwargs)), node)
                if first is not node:
                    node.replace_all_uses_with(first)
                    continue
                args, kwargs = fx.node.map_aggregate(
                    (node.args, node.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else a
                )
                with torch.no_grad():
                    values[node] = node.target(*self._widened(args), **kwargs)
        for node in values:
            outside = [user for user in node.users if user not in values]
            if node.op != "call_function" or not outside or not isinstance(values[node], Tensor):
                continue
            constant = work.add_constant(values[node].clone(), node.name, dtype_of(node), like=node)
            for user in outside:
                user.replace_input_with(node, constant)
            notes.append(Note.at(node, f"{node.target} of constants evaluated"))
        return PassResult(work.clean(), notes) if notes else PassResult(program)

    def evaluable(self, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        if any(source not in values for source in node.all_input_nodes):
            return False
        if isinstance(node.target, torch._ops.OpOverload) and RANDOM in node.target.tags:
            return False
        if not is_tensor(node):
            return node.target is not operator.getitem or node.args[0] in values
        if not self.static(node):
            return False
        inputs = sum(v.numel() for s in node.all_input_nodes if isinstance(v := values[s], Tensor))
        return node.meta["val"].numel() <= max(self.limit, inputs)

    @staticmethod
    def static(node: fx.Node) -> bool:
        return not any(isinstance(d, torch.SymInt) for d in node.meta["val"].shape)

    @staticmethod
    def _widened(args: tuple) -> tuple:
        """Floating constants in float64: the rounding to the declared dtype comes at the end, once."""
        return fx.node.map_aggregate(
            args,
            lambda a: (
                a.double() if isinstance(a, Tensor) and a.dtype in (torch.float32, torch.float16, torch.bfloat16) else a
            ),
        )
