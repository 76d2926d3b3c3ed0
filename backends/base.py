"""The backend contract: a program in, something that runs on flat tensors out."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from thresher.errors import BackendError
from thresher.program import Program


class Lowered(ABC):
    """A program in the form a backend runs.

    ``memory``: bytes that it takes, by what for (``weights``, ``activations``), as far as the backend knows.
    """

    memory: dict[str, int]

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat tensor inputs (torch or NumPy) -> flat tensor outputs of the same kind. Safe to call from several threads."""

    @abstractmethod
    def save(self, directory: Path) -> dict[str, Any]:
        """Write what is needed to load again into ``directory``; returns what the manifest must say about it."""


class Backend(ABC):
    """Lowers programs. Registered under the entry point group ``thresher.backends``."""

    name: ClassVar[str] = ""

    @abstractmethod
    def lower(
        self,
        program: Program,
        target: str,
        progress: Callable[[str], None] = lambda message: None,
        strict_rounding: bool = False,
    ) -> Lowered:
        """Lower ``program`` (already rounded) for ``target``. Raises :class:`BackendError` naming the node it cannot lower.

        ``strict_rounding``: sums only as the operators define them, in any order; no algorithm that rounds more (Winograd's).
        """

    @abstractmethod
    def load(self, directory: Path, manifest: dict[str, Any]) -> Lowered:
        """What :meth:`Lowered.save` wrote."""


def find_backend(name: str) -> Backend:
    """A backend by its name."""
    found = {e.name: e for e in importlib.metadata.entry_points(group="thresher.backends")}
    if name not in found:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(sorted(found))}")
    return found[name].load()()
