"""Read the nodes of a graph: what they yield, and where in the user's code they come from."""

from __future__ import annotations

import operator
import os
from typing import Any

import torch
from torch import Tensor, fx

TORCH_FOLDER = os.path.dirname(torch.__file__)
GENERATED_FILE = "<eval_with_key>"  # the code of fx graphs
ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "torch_fn", "source_fn_stack")


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the module that produced ``node``, or the node's name where none is known."""
    stack = node.meta.get("nn_module_stack")
    paths = [entry[0] for entry in stack.values()] if stack else []
    path = paths[-1] if paths else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']") or node.name


def source_line(node: fx.Node) -> str:
    """Return the innermost ``File "...", line N`` outside torch that led to ``node``, or an empty string."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    frames = [line for line in lines if line.startswith("File ")]
    foreign = (TORCH_FOLDER, GENERATED_FILE)
    return next((f for f in reversed(frames) if not any(k in f for k in foreign)), frames[-1] if frames else "")


def copy_origin(target: fx.Node, source: fx.Node) -> None:
    """Give ``target`` the origin of ``source`` in the user's code."""
    for key in ORIGIN_KEYS:
        if key in source.meta:
            target.meta[key] = source.meta[key]


def is_tensor(node: Any) -> bool:
    """Return whether ``node`` is a graph node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)


class Shape(tuple):
    """A shape with free sizes (``SymInt``). It equals another one that it equals whatever the free sizes are.

    To ask a free size itself with ``==`` answers for the example, and fixes the size at that for the whole program.
    """

    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(self) == len(other) and all(map(same_size, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return Shape(part) if isinstance(index, slice) else part


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Return whether two sizes are equal whatever the free sizes are; no free size is fixed by the question."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return torch.fx.experimental.symbolic_shapes.statically_known_true(a == b)
    return a == b


def shape_of(node: fx.Node) -> tuple:
    """Return the shape of a tensor node; where it has free sizes (``SymInt``), a :class:`Shape`."""
    shape = tuple(node.meta["val"].shape)
    return Shape(shape) if any(type(d) is not int for d in shape) else shape


def dtype_of(node: fx.Node) -> torch.dtype:
    """Return the declared dtype of a tensor node."""
    return node.meta["val"].dtype


def getitem_users(node: fx.Node) -> dict[int, fx.Node]:
    """Return the ``getitem`` nodes of a call with several results, by index."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}
