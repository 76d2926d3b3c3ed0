"""The backend contract: a program in, something that runs on flat tensors out."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from thresher.errors import BackendError
from thresher.ir.program import Program
from thresher.progress import Progress
from thresher.runtime.weight_store import Weights
from thresher.tuning.options import Tune
from thresher.tuning.records import Record


@dataclass(frozen=True)
class LoweringOptions:
    """How to lower.

    ``strict_rounding``: sums only as the operators define them, in any order; no algorithm that rounds more (Winograd's). ``records``: what
    tuning found fastest, workload -> plan (:meth:`Backend.tune`). ``library``: a plan may be to call torch's own kernel. ``progress`` is
    told what is being done. ``shared_weights``: weights of another model, packed; where kernels can read a weight as it is there, they do.
    """

    strict_rounding: bool = False
    records: Mapping[str, str] = field(default_factory=dict)
    library: bool = False
    progress: Progress = lambda message: None
    shared_weights: Weights | None = None


DEFAULT = LoweringOptions()


@dataclass(frozen=True)
class KernelTime:
    """What one kernel takes in a run: ``nodes`` of the lowered program that it computes, as far as that is known."""

    name: str
    nodes: tuple[str, ...]
    milliseconds: float


class Executable(ABC):
    """A program in the form a backend runs.

    ``memory``: bytes that it takes, by what for (``weights``, ``activations``), as far as the backend knows. ``tuned``:
    workloads whose plan came from a record, of all that have plans. ``library``: the nodes that torch computes.
    """

    memory: dict[str, int]
    tuned: tuple[int, int] = (0, 0)
    library: Sequence[str] = ()

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat tensor inputs (torch or NumPy) -> flat tensor outputs of the same kind. Safe to call from several threads."""

    def profile(self, inputs: Sequence[Any]) -> list[KernelTime]:
        """The kernels in the order in which they run, each with its median time; empty where a backend has nothing to say."""
        return []

    def as_text(self) -> str:
        """Return the generated code in a readable form; empty where a backend has none."""
        return ""

    def constants(self) -> Weights | None:
        """The constants as they are packed, by their content; None where a backend has no such form."""
        return None

    @abstractmethod
    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        """Write the code as ``model.so`` into ``directory`` and add the constants to ``weights``; returns what the manifest must say."""


class Backend(ABC):
    """Lowers programs. Registered under the entry point group ``thresher.backends``."""

    name: ClassVar[str] = ""
    tunable: ClassVar[bool] = False  # whether it has the three methods about tuning

    @abstractmethod
    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        """Lower ``program`` (already rounded) for ``target``. Raises :class:`BackendError` naming the node it cannot lower."""

    def runs_here(self, target: str) -> bool:
        """Whether this machine can run what is lowered for ``target``."""
        import torch

        return target.startswith("cpu") or torch.cuda.is_available()

    def fingerprint(self, target: str) -> str:
        """What a tuning record depends on besides its workload: the machine and the versions."""
        raise BackendError(f"the backend {self.name!r} has nothing to tune")

    def shipped(self) -> Sequence[Record]:
        """Records that come with the library."""
        return ()

    def tune(
        self,
        program: Program,
        target: str,
        options: Tune,
        lowering_options: LoweringOptions,
        save: Callable[[Record], None],
    ) -> int:
        """Measure the workloads of ``program`` that ``lowering_options.records`` lacks; each record is ``save``d as soon as it stands.
        Returns their number."""
        raise BackendError(f"the backend {self.name!r} has nothing to tune")

    @abstractmethod
    def load(self, code: bytes, manifest: dict[str, Any], weights: Weights) -> Executable:
        """What :meth:`Executable.save` wrote."""


def find_backend(name: str) -> Backend:
    """A backend by its name."""
    found = {e.name: e for e in importlib.metadata.entry_points(group="thresher.backends")}
    if name not in found:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(sorted(found))}")
    return found[name].load()()
