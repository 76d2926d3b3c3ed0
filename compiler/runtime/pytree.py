"""The nesting of arguments and results, without torch: read from what torch's pytree writes, for tuples, lists and dictionaries."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from thresher.errors import InputError

SEQUENCES: dict[str, type] = {"builtins.tuple": tuple, "builtins.list": list}


@dataclass(frozen=True)
class PyTree:
    """``kind`` None is a leaf; dictionaries, and containers that are not known here, have ``keys``."""

    kind: str | None
    keys: tuple[Any, ...] | None
    parts: tuple[PyTree, ...]

    @staticmethod
    def read(text: str) -> PyTree:
        """What ``torch.utils._pytree.treespec_dumps`` wrote."""
        return PyTree._of(json.loads(text)[1])

    @staticmethod
    def _of(raw: dict[str, Any]) -> PyTree:
        context = json.loads(raw["context"]) if raw["context"] else None
        keys = tuple(context) if isinstance(context, list) and raw["type"] not in SEQUENCES else None
        return PyTree(raw["type"], keys, tuple(PyTree._of(p) for p in raw["children_spec"]))

    def flatten(self, value: Any, place: str = "the arguments") -> Iterator[Any]:
        """The leaves of ``value``, which must be nested like this."""
        if self.kind is None:
            yield value
        elif self.kind in SEQUENCES:
            container = SEQUENCES[self.kind]
            if (
                not isinstance(value, (tuple, list))
                or not isinstance(value, container)
                or len(value) != len(self.parts)
            ):
                raise InputError(f"{place} must be a {container.__name__} of {len(self.parts)}")
            for i, (part, v) in enumerate(zip(self.parts, value)):
                yield from part.flatten(v, f"{place}[{i}]")
        else:
            if not isinstance(value, dict) or set(value) != set(self.keys or ()):
                raise InputError(f"{place} must be a dictionary of {', '.join(map(repr, self.keys or ()))}")
            for key, part in zip(self.keys or (), self.parts):
                yield from part.flatten(value[key], f"{place}[{key!r}]")

    def assemble(self, leaves: Iterator[Any]) -> Any:
        """The nesting around the leaves, in order. What is no tuple or list becomes a dictionary."""
        if self.kind is None:
            return next(leaves)
        values: Sequence[Any] = [part.assemble(leaves) for part in self.parts]
        if self.kind in SEQUENCES:
            return SEQUENCES[self.kind](values)
        return dict(zip(self.keys, values)) if self.keys is not None else tuple(values)
