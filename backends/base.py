"""The contract of a backend: it lowers a program to an executable, which runs on flat tensors and can be saved and loaded.

A backend is a subclass of :class:`Backend` with a constructor without arguments, named under the entry point group
``thresher.backends``. The least it implements is ``name``, :meth:`Backend.lower`, :meth:`Backend.load`, :meth:`Executable.run`,
:meth:`Executable.save` and ``Executable.memory``. Tuning is optional (``tunable``), and so are profiles and shared constants.
"""

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
    """The wishes of the caller about how a program is lowered; a backend may ignore all but ``strict_rounding``.

    Attributes:
        strict_rounding: compute sums only as the operators define them, in any order; use no algorithm that rounds more (Winograd's).
        records: workload -> plan, both texts of the backend's own (:meth:`Backend.tune`): the plans that were measured as fastest. A
            plan that the backend does not know any more is ignored.
        library: torch's own kernel may be called, where there is no other lowering or a record says that it is faster; the executable
            then needs torch where it runs.
        progress: is called with a short message when a long step begins.
        shared_weights: the packed constants of another model of the same artifact (:meth:`Executable.constants`). Where a kernel can
            read a weight in a form that is there, it does, and the artifact stores the weight once.
        library_nodes: names of nodes that torch is to compute, each with the reason.
    """

    strict_rounding: bool = False
    records: Mapping[str, str] = field(default_factory=dict)
    library: bool = False
    progress: Progress = lambda message: None
    shared_weights: Weights | None = None
    library_nodes: Mapping[str, str] = field(default_factory=dict)


DEFAULT = LoweringOptions()


MEASURED_AS_FASTER = "measured as faster"  # the reason of a library call that tuning chose


@dataclass(frozen=True)
class LibraryCall:
    """A node that torch computes, by the name of its operator, and the reason why it is not lowered."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class KernelTime:
    """The time of one kernel in a run.

    Attributes:
        name: of the kernel in the generated code.
        nodes: names of the nodes of the lowered program that it computes; empty where the backend does not know them.
        milliseconds: the median over several runs.
    """

    name: str
    nodes: tuple[str, ...]
    milliseconds: float


class Executable(ABC):
    """A program in the form in which a backend runs it.

    Attributes:
        memory: bytes by their use, ``weights`` and ``activations`` as far as the backend knows them; set by every executable.
        tuned: the number of workloads whose plan came from a record, and of all that have plans.
        library: the nodes that torch computes.
        rounds_more: it has an algorithm that rounds more than the operators do, and ``strict_rounding`` would leave it out.
    """

    memory: dict[str, int]
    tuned: tuple[int, int] = (0, 0)
    library: Sequence[LibraryCall] = ()
    rounds_more: bool = False

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Compute the outputs of the program. Safe to call from several threads.

        Args:
            inputs: one tensor for every tensor placeholder of the program, in their order, with the shapes and dtypes of the
                placeholders (dynamic dimensions: any size), on the target's device; all of torch or all of NumPy. The caller has checked
                them. They need be neither contiguous nor aligned, and stay as they are.

        Returns:
            The tensor outputs of the program in their order, of the kind of the inputs. They share memory neither with these nor with
            each other.
        """

    def profile(self, inputs: Sequence[Any]) -> list[KernelTime]:
        """Run on torch ``inputs``, as for :meth:`run`, and return every kernel in the order of execution with its time.

        A backend that cannot tell returns an empty list. The whole call should take no more than about a second.
        """
        return []

    def as_text(self) -> str:
        """Return the generated code in a readable form; empty where a backend has none."""
        return ""

    def constants(self) -> Weights | None:
        """Return the constants as they are packed, for ``LoweringOptions.shared_weights``; None where a backend has no such form."""
        return None

    @abstractmethod
    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        """Write the code as ``model.so`` into ``directory``, which exists, and add the constants to ``weights``.

        Returns:
            What :meth:`Backend.load` needs besides the code and the constants, to be kept as JSON. ``weights.add`` returns the part that
            finds the constants again. The key ``library`` lists the nodes that torch computes; an artifact with such nodes is not loaded
            without torch. The keys ``sizes``, ``batched`` and ``times`` are taken by :class:`BatchedExecutable`.

        Raises:
            BackendError: this executable has no form that can be saved.
            OSError: the disk is full or cannot be written.
        """


class Backend(ABC):
    """A way to run programs on a kind of machine.

    Attributes:
        name: by which ``compile(backend=...)`` finds it: the name of its entry point.
        tunable: it implements :meth:`fingerprint`, :meth:`tune` and, if records come with it, :meth:`shipped`.
        specializes: the driver runs the specialising pipeline before :meth:`lower`, so the backend must know the operators that these
            passes insert; a program with a free batch dimension is lowered once for each of a few batch sizes.

    A *target* is a text that names a machine: ``cpu`` or ``cuda...`` and, after a colon, what the backend defines. :meth:`lower`
    raises :class:`BackendError` for one that it does not know.
    """

    name: ClassVar[str] = ""
    tunable: ClassVar[bool] = False
    specializes: ClassVar[bool] = False

    @abstractmethod
    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        """Generate code for ``target``.

        ``program`` is already rounded to the dtypes that it runs in, has no mutation and no control flow, and is not changed here.

        Raises:
            BackendError: a node cannot be lowered, and the message names it; or the target is unknown.
        """

    def runs_here(self, target: str) -> bool:
        """Return whether this machine can run what is lowered for ``target``; then the result is checked against eager and timed."""
        import torch

        return target.startswith("cpu") or torch.cuda.is_available()

    def fingerprint(self, target: str) -> str:
        """Return what a tuning record depends on besides its workload: the machine and the versions of what generates code.

        Records are used only under the fingerprint under which they were measured.
        """
        raise BackendError(f"the backend {self.name!r} has nothing to tune")

    def shipped(self) -> Sequence[Record]:
        """Return the records that come with the backend; those of the user's own file go before them."""
        return ()

    def tune(
        self,
        program: Program,
        target: str,
        options: Tune,
        lowering_options: LoweringOptions,
        save: Callable[[Record], None],
    ) -> int:
        """Measure the workloads of ``program`` that ``lowering_options.records`` lacks.

        A workload is a text of the backend's own for a kernel that may be built in several ways, a plan the text of one way. Each record
        is ``save``d as soon as it is complete, so that an interrupted run goes on where it was; a record with an empty plan says that
        none is faster by ``options.min_speedup`` than what is built without a record.

        Returns:
            The number of workloads that were measured.

        Raises:
            BackendError: there is nothing to tune, or no device to measure on.
        """
        raise BackendError(f"the backend {self.name!r} has nothing to tune")

    @abstractmethod
    def load(self, code: bytes, manifest: dict[str, Any], weights: Weights) -> Executable:
        """Return the executable that :meth:`Executable.save` wrote.

        Args:
            code: the content of ``model.so``.
            manifest: what ``save`` returned, after a round trip through JSON.
            weights: the constants of all models of the artifact; ``weights.find`` returns those of this one.

        Raises:
            BackendError: this machine cannot load such code. Hashes, versions and the target are already checked.
        """


def find_backend(name: str) -> Backend:
    """Return the backend that is registered under ``name``; raises :class:`BackendError` with the known names where there is none."""
    backends = {e.name: e for e in importlib.metadata.entry_points(group="thresher.backends")}
    if name not in backends:
        raise BackendError(f"unknown backend {name!r}; known: {', '.join(sorted(backends))}")
    return backends[name].load()()
