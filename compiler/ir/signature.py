"""torch's pytrees as the trees of the runtime (:mod:`thresher.runtime.pytree`), with every container that torch knows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from thresher.runtime.pytree import LEAF, Container, Dictionary, PyTree, Row


@dataclass(frozen=True)
class Registered(Container):
    """A container that is registered with torch's pytree: named tuples, data classes, results of transformers.

    ``spec`` is its one level, with leaves as children.
    """

    spec: pytree.TreeSpec

    def split(self, value: Any) -> Sequence[Any] | None:
        children, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        return children if spec == self.spec else None

    def build(self, children: list[Any]) -> Any:
        if self.spec.type is torch.Size:  # torch's pytree makes a tuple of it
            return torch.Size(children)
        return pytree.tree_unflatten(children, self.spec)

    def describe(self) -> str:
        kind = self.spec.context if isinstance(self.spec.context, type) else self.spec.type
        return f"a {kind.__name__} as it was captured"

    def to_json(self) -> dict[str, Any]:
        """Raise ``NotImplementedError`` where torch has no name to serialise the class by."""
        raw = json.loads(pytree.treespec_dumps(self.spec))[1]
        return {"type": raw["type"], "context": raw["context"]}


def tree_of(spec: pytree.TreeSpec) -> PyTree:
    """Return the runtime's tree of a torch ``TreeSpec``."""
    if spec.is_leaf():
        return LEAF
    children = tuple(map(tree_of, spec.children()))
    if spec.type in (tuple, list):
        return PyTree(Row(spec.type, len(children)), children)
    if spec.type is dict:
        return PyTree(Dictionary(tuple(spec.context)), children)
    leaves = pytree.tree_flatten([0] * len(children))[1].children()
    return PyTree(Registered(pytree.TreeSpec(spec.type, spec.context, leaves)), children)


def read_tree(text: str) -> PyTree:
    """Return the tree of a text by ``treespec_dumps``; its containers must be known to torch's pytree in this process."""
    return tree_of(pytree.treespec_loads(text))


def dimension(size: int | torch.SymInt) -> int | str:
    """Return a dimension of a fake tensor as a number, or as the name of its symbol."""
    return str(size) if isinstance(size, torch.SymInt) else int(size)
