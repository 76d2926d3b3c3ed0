"""The nesting of arguments and results, as trees of containers. Written as torch's pytree writes it, and read without torch.

Tuples, lists and dictionaries are known here. Whoever knows other containers (:mod:`thresher.ir.signature` those of torch's pytree)
hands in a :class:`Container` for them; without one, a container that has keys is a dictionary.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from thresher.errors import InputError

PROTOCOL = 1  # of torch.utils._pytree.treespec_dumps
NESTED = (tuple, list, dict)


class Container(ABC):
    """One level of a nesting."""

    @abstractmethod
    def split(self, value: Any) -> Sequence[Any] | None:
        """Return the children of ``value`` in order, or None if ``value`` is not such a container."""

    @abstractmethod
    def build(self, children: list[Any]) -> Any:
        """Return the container around ``children``."""

    @abstractmethod
    def describe(self) -> str:
        """Return the container with its article: ``a tuple of 2``."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return ``type`` and ``context`` as ``torch.utils._pytree.treespec_dumps`` writes them."""

    def key(self, index: int) -> Any:
        """Return what a child is reached by; for error messages."""
        return index


@dataclass(frozen=True)
class Row(Container):
    """A tuple or a list of ``count`` children."""

    kind: type[tuple] | type[list]
    count: int

    def split(self, value: Any) -> Sequence[Any] | None:
        return value if isinstance(value, self.kind) and len(value) == self.count else None

    def build(self, children: list[Any]) -> Any:
        return self.kind(children)

    def describe(self) -> str:
        return f"a {self.kind.__name__} of {self.count}"

    def to_json(self) -> dict[str, Any]:
        return {"type": f"builtins.{self.kind.__name__}", "context": "null"}


@dataclass(frozen=True)
class Dictionary(Container):
    """A dictionary of ``keys``. ``kind`` is the name of its class, whose instances come back as plain dictionaries."""

    keys: tuple[Any, ...]
    kind: str = "builtins.dict"

    def split(self, value: Any) -> Sequence[Any] | None:
        if not isinstance(value, dict) or len(value) != len(self.keys) or any(key not in value for key in self.keys):
            return None
        return [value[key] for key in self.keys]

    def build(self, children: list[Any]) -> Any:
        return dict(zip(self.keys, children))

    def describe(self) -> str:
        return f"a dictionary of {', '.join(map(repr, self.keys))}" if self.keys else "an empty dictionary"

    def to_json(self) -> dict[str, Any]:
        return {"type": self.kind, "context": json.dumps(self.keys)}

    def key(self, index: int) -> Any:
        return self.keys[index]


@dataclass(frozen=True)
class PyTree:
    """A nesting without its values. ``container`` None is a leaf."""

    container: Container | None = None
    children: tuple[PyTree, ...] = ()

    @staticmethod
    def read(text: str) -> PyTree:
        """Return the tree of a text by ``torch.utils._pytree.treespec_dumps`` or :meth:`dumps`."""
        return _from_json(json.loads(text)[1])

    def dumps(self) -> str:
        """Return the text that :meth:`read` and ``torch.utils._pytree.treespec_loads`` read."""
        return json.dumps([PROTOCOL, self._to_json()])

    def _to_json(self) -> dict[str, Any]:
        head = {"type": None, "context": None} if self.container is None else self.container.to_json()
        return {**head, "children_spec": [child._to_json() for child in self.children]}

    @cached_property
    def leaf_count(self) -> int:
        """The number of leaves."""
        return 1 if self.container is None else sum(child.leaf_count for child in self.children)

    def flatten_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the leaves of a call. The tree is that of ``(args, kwargs)``; keyword arguments may come in any order.

        Raises :class:`InputError` naming the argument that is nested in another way.
        """
        if len(args) == self._plain_arguments and not kwargs and not any(isinstance(a, NESTED) for a in args):
            return list(args)
        positional, named = self.children
        names = named.container.keys if isinstance(named.container, Dictionary) else ()
        for name in kwargs:
            if name not in names:
                raise InputError(f"the model takes no argument {name!r}: it was captured with another structure")
        leaves: list[Any] = []
        positional._flatten(tuple(args), ("the arguments",), leaves)
        named._flatten(kwargs, ("the keyword arguments",), leaves)
        return leaves

    @cached_property
    def _plain_arguments(self) -> int:
        """The number of arguments where all are positional and none is nested, as in almost every call; else -1."""
        positional, named = self.children
        return (
            -1 if named.children or any(child.children for child in positional.children) else len(positional.children)
        )

    def _flatten(self, value: Any, path: tuple[Any, ...], leaves: list[Any]) -> None:
        if self.container is None:
            if isinstance(value, NESTED):
                raise _mismatch(path, f"one value, not a {type(value).__name__}")
            leaves.append(value)
            return
        values = self.container.split(value)
        if values is None:
            raise _mismatch(path, self.container.describe())
        for index, (child, v) in enumerate(zip(self.children, values)):
            if child.container is None and not isinstance(v, NESTED):
                leaves.append(v)
            else:
                child._flatten(v, (*path, self.container.key(index)), leaves)

    def assemble(self, leaves: Iterator[Any]) -> Any:
        """Return the nesting around the leaves, in order."""
        if self.container is None:
            return next(leaves)
        return self.container.build([child.assemble(leaves) for child in self.children])


LEAF = PyTree()


def _mismatch(path: tuple[Any, ...], expected: str) -> InputError:
    location = path[0] + "".join(f"[{key!r}]" for key in path[1:])
    return InputError(f"{location} must be {expected}: the model was captured with another structure")


def _from_json(raw: dict[str, Any]) -> PyTree:
    children = tuple(map(_from_json, raw["children_spec"]))
    name = raw["type"]
    if name is None:
        return LEAF
    if name in ("builtins.tuple", "builtins.list"):
        return PyTree(Row(tuple if name == "builtins.tuple" else list, len(children)), children)
    context = json.loads(raw["context"]) if isinstance(raw["context"], str) else raw["context"]
    if isinstance(context, dict):  # of a defaultdict
        context = context.get("dict_context")
    if not isinstance(context, list) or len(context) != len(children):
        return PyTree(Row(tuple, len(children)), children)
    return PyTree(Dictionary(tuple(context), name), children)
