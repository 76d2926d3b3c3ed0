"""The channels-last twins of values: ``[N, C, H, W]`` is held as ``[N, H, W, C]``; what needs the value itself gets it from its twin."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program

aten = torch.ops.aten
#: By rank: the axis of the twin for each axis of the channels-first value.
AXIS_IN_TWIN = {3: {0: 0, 1: 3, 2: 2}, 4: {0: 0, 1: 3, 2: 1, 3: 2}, 5: {0: 0, 1: 4, 2: 1, 3: 2, 4: 3}}


def to_last(rank: int) -> list[int]:
    """Return the permutation of ``rank`` axes to channels-last."""
    return [0, *range(2, rank), 1]


def to_first(rank: int) -> list[int]:
    """Return the permutation back to channels-first."""
    return [0, rank - 1, *range(1, rank - 1)]


class Layout:
    """The twins of a program's values: ``last[v]`` is the twin of ``v``; for ``v`` in ``computed`` an operator computes the twin itself."""

    def __init__(self, program: Program):
        self.program = program
        self.last: dict[fx.Node, fx.Node] = {}
        self.computed: set[fx.Node] = set()

    def emit(self, node: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> bool:
        """Insert a call before ``node`` as its computed twin; returns True, for rules to return."""
        self.last[node] = self.program.insert_call(node, target, args, kwargs, like=node)
        self.computed.add(node)
        return True

    def constant(self, value: torch.Tensor, rank: int, like: fx.Node) -> fx.Node:
        """Add a constant on the channels-last side; lower ranks are aligned to the right first."""
        value = value.reshape([1] * (rank - value.dim()) + list(value.shape)).permute(to_last(rank))
        value = value.unsqueeze(1) if rank == 3 else value
        return self.program.add_constant(value.contiguous(), f"{like.target}_last", dtype_of(like), like=like)

    def permuted(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """Return the twin of a computed value by a permutation, or what the value is itself the permutation of."""
        rank = len(shape_of(value))
        if value.target is aten.permute.default and [d % rank for d in value.args[1]] == to_first(rank):
            twin = value.args[0]
        else:
            twin = self.program.insert_call(before, aten.permute.default, (value, to_last(rank)), like=value)
        return self.program.insert_call(before, aten.unsqueeze.default, (twin, 1), like=value) if rank == 3 else twin

    def twin(self, value: fx.Node) -> fx.Node:
        """Return the channels-last twin of a value, made where it has none."""
        if value not in self.last:
            constant, following = self.program.constant(value), value.next
            while following.op in ("placeholder", "get_attr"):
                following = following.next
            self.last[value] = (
                self.permuted(value, following) if constant is None else self.constant(constant, constant.dim(), value)
            )
        return self.last[value]

    def operand(self, value: Any, rank: int, before: fx.Node) -> Any:
        """Return an elementwise operand on the channels-last side; lower ranks are aligned to the right first."""
        if not is_tensor(value) or len(shape_of(value)) == 0:
            return value
        missing = rank - len(shape_of(value))
        if missing == 0:
            return self.twin(value)
        constant = self.program.constant(value)
        if constant is not None:
            return self.constant(constant, rank, value)
        shape = [1] * missing + list(shape_of(value))
        wide = self.program.insert_call(before, aten.reshape.default, (value, shape), like=value)
        return self.permuted(wide, before)

    def first(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """Return ``value`` from its twin, channels-first."""
        twin, rank = self.last[value], len(shape_of(value))
        if rank == 3:
            twin = self.program.insert_call(before, aten.squeeze.dims, (twin, [1]), like=value)
        return self.program.insert_call(before, aten.permute.default, (twin, to_first(rank)), like=value)

    def back_to_first(self) -> None:
        """Give every remaining reader of a channels-first value a permutation of its twin."""
        for value in self.computed:
            if not all(user in self.computed for user in value.users):
                value.replace_all_uses_with(self.first(value, value))
