"""What every row of the operator table answers, and the safe default."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, hint, sizes
from thresher.analysis.slices.ties import Key, Tie
from thresher.ir.nodes import is_tensor

aten = torch.ops.aten


Facts = dict[fx.Node, Known]


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of a call, lists flattened, in order and without repetition."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name, or its default."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def concrete(value: Any) -> Any:
    """Literals of a call with the example's numbers for symbolic ones, and float64 for every floating dtype."""

    def one(v: Any) -> Any:
        if isinstance(v, fx.Node):
            v = v.meta["val"]
        if isinstance(v, torch.SymInt):
            return hint(v)
        return torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v

    return fx.node.map_aggregate(value, one)


def evaluate(node: fx.Node, values: dict[fx.Node, Tensor]) -> Tensor:
    """Run the call on the given tensors."""
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda a: values[a] if isinstance(a, fx.Node) and a in values else concrete(a)
    )
    with torch.no_grad():
        return node.target(*args, **kwargs)


class TransferRule:
    """The safe default: nothing is known, everything is read, nothing is cut."""

    supported = False

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        return None

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        everything = bool(wanted.any())
        return {n: torch.full([1] * len(sizes(n)), everything) for n in tensors(node)}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        return []

    def pins(self, node: fx.Node, facts: Facts) -> list[tuple[Key, Tensor]]:
        """Indices that must stay although nothing reads or varies them."""
        return []

    def narrow(self, node: fx.Node, plan: Any) -> None:
        return None


def is_constant(node: Any, facts: Facts) -> bool:
    """Whether ``node`` is a constant of the program (a computed value that is only partly known is not)."""
    return isinstance(node, fx.Node) and node.op == "get_attr" and node in facts


def nothing(node: fx.Node) -> Tensor:
    dtype = node.meta["val"].dtype
    return torch.zeros([1] * len(sizes(node)), dtype=torch.float64 if dtype.is_floating_point else dtype)


def mask_of(node: fx.Node, facts: Facts) -> Tensor:
    return facts[node].mask if node in facts else torch.zeros([1] * len(sizes(node)), dtype=torch.bool)
