"""Compute at compile time what does not depend on an input.

    f(c_1, ..., c_n) = c              c: one new constant, for every use of the call
    zeros_like(x) = 0 [shape of x]    also ones_like and full_like: they read only the shape, which is known

So masks of ``torch.nn.utils.prune`` (``weight_orig * mask``), parametrizations, weight norm, gates that are parameters, position grids and
attention masks built from ``arange`` become constants. They are computed in float64 and rounded once, to the declared dtype.

The call must be deterministic, with sizes that are all numbers. It stays as it is where it draws random numbers, has a dynamic size, is
larger than ``limit`` and than its arguments together, or expands a parameter, because the copies would be trained apart. (Constant
propagation: Kildall, POPL 1973.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.ir.lineage import Restore, Values, computed, moved
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program, Role
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten
#: Operators that read only the shape of their argument, and the number that they fill it with.
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
    keeps_copies: ClassVar[bool] = True
    limit: int = 1 << 24  # a result may have this many elements, or as many as the constants it is made from

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.limit >= 0, "limit", "a number of elements, from 0 on")

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        values: dict[fx.Node, Any] = {}
        still: set[fx.Node] = set()  # values that training does not change
        same: dict[
            tuple, fx.Node
        ] = {}  # one constant for equal calls: a mask is multiplied anew at each use of its layer
        for node in list(work.graph.nodes):
            if node.op == "get_attr":
                values[node] = work.constants[node.target]
                if work.role(str(node.target)) is not Role.PARAMETER:
                    still.add(node)
            elif node.op == "call_function" and node.target in FILLED and self.static(node):
                values[node] = torch.full(node.meta["val"].shape, FILLED[node.target](node), dtype=dtype_of(node))
                still.add(node)
            elif node.op == "call_function" and self.evaluable(node, values, still):
                first = same.setdefault((node.target, str(node.args), str(node.kwargs)), node)
                if first is node:
                    values[node] = self._value(node, values)
                    still |= {node} if all(n in still for n in node.all_input_nodes) else set()
                else:
                    node.replace_all_uses_with(first)
        for node in values:
            outside = [user for user in node.users if user not in values]
            if node.op != "call_function" or not outside or not isinstance(values[node], Tensor):
                continue
            role = Role.BUFFER if node in still else Role.PARAMETER
            constant = work.add_constant(values[node].clone(), node.name, dtype_of(node), like=node, role=role)
            for user in outside:
                user.replace_input_with(node, constant)
            name = str(constant.target)
            work.lineage.append(way_back(work, node, name, values) or computed(name, _values(work, _sources(node))))
            notes.append(Note.at(node, f"{node.target} of constants evaluated"))
        return PassResult(work.clean(), notes) if notes else PassResult(program)

    def evaluable(self, node: fx.Node, values: dict[fx.Node, Any], still: set[fx.Node]) -> bool:
        """Return whether a call has known, small, deterministic results, and would not tear a trained parameter into copies."""
        if any(source not in values for source in node.all_input_nodes):
            return False
        if (
            node.target is aten.expand.default and node.args[0] not in still
        ):  # copies of a parameter would be trained apart
            learned = values[node.args[0]]
            if learned.is_floating_point() and node.meta["val"].numel() != learned.numel():
                return False
        if isinstance(node.target, torch._ops.OpOverload) and RANDOM in node.target.tags:
            return False
        if not is_tensor(node):
            return True
        if not self.static(node):
            return False
        inputs = sum(v.numel() for s in node.all_input_nodes if isinstance(v := values[s], Tensor))
        return node.meta["val"].numel() <= max(self.limit, inputs)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return the result of a call; floating numbers in float64, unless it only moves them: that would double a weight."""
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else a
        )
        with torch.no_grad():
            return node.target(*(args if node.target in MOVES else self._widened(args)), **kwargs)

    @staticmethod
    def static(node: fx.Node) -> bool:
        """Return whether all sizes of a tensor are numbers."""
        return not any(isinstance(d, torch.SymInt) for d in node.meta["val"].shape)

    @staticmethod
    def _widened(args: tuple) -> tuple:
        """Return floating constants in float64: the rounding to the declared dtype comes at the end, once."""
        return fx.node.map_aggregate(
            args,
            lambda a: (
                a.double() if isinstance(a, Tensor) and a.dtype in (torch.float32, torch.float16, torch.bfloat16) else a
            ),
        )


MOVES = (
    aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int, aten.t.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.dims, aten.clone.default, aten.alias.default, aten.detach.default,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, operator.getitem,
    aten.index_select.default, aten.embedding.default,
)  # fmt: skip


def _sources(value: Any) -> set[fx.Node]:
    """Return the constants that a factor is computed of."""
    seen, todo = set(), [value] if isinstance(value, fx.Node) else []
    while todo:
        node = todo.pop()
        if node not in seen:  # the masks of shifted windows reach one constant in millions of ways
            seen.add(node)
            todo += [] if node.target in FILLED else node.all_input_nodes
    return {node for node in seen if node.op == "get_attr"}


def _values(program: Program, constants: set[fx.Node]) -> Values:
    return {str(n.target): program.constants[n.target] for n in constants}


def way_back(program: Program, node: fx.Node, name_of_result: str, values_of: dict[fx.Node, Any]) -> Restore | None:
    """Return the way from an evaluated constant back to its parameter, through products with constants (masks) and moved elements.

    None where there is another operator in between, or where a factor is computed of the parameter itself.
    """
    factor: Tensor | float = 1.0
    factors: set[fx.Node] = set()
    moves: list[fx.Node] = []
    source = node
    while source.op != "get_attr":
        if source.target is aten.mul.Tensor and not moves:
            other = source.args[1]
            factor = factor * (values_of[other].double() if isinstance(other, fx.Node) else other)
            factors |= _sources(other)
        elif source.target in MOVES:
            moves.append(source)
        else:
            return None
        source = source.args[0]
    name, original = str(source.target), program.constants[source.target]
    calls = [
        (m.target, [values_of[a] if isinstance(a, fx.Node) else a for a in m.args[1:]], dict(m.kwargs))
        for m in reversed(moves)
    ]

    def move(tensor: Tensor) -> Tensor:
        value: Any = tensor
        for target, rest, kwargs in calls:
            value = target(value, *rest, **kwargs)
        return value

    if not original.is_floating_point() or source in factors:
        return None
    inner = moved(name_of_result, name, original, move)

    def back(values: Values) -> Values:
        before = move(values.get(name, original))
        live = torch.as_tensor(factor) != 0
        value = torch.where(live, values[name_of_result] / torch.where(live, torch.as_tensor(factor), 1.0), before)
        return inner.back({**values, name_of_result: value})

    return Restore((name_of_result,), back, _values(program, factors))
