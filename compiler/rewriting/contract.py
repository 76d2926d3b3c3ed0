"""The contract of a pass: its arguments, its result, and its promises.

A pass is a frozen dataclass with a class-level ``name``; its fields are its options, on the command line too
(``"fold-channels{strict=true}"``). ``apply`` takes a program and returns a new one with a note for every rewrite and every
refusal; it never changes its input. :class:`~thresher.rewriting.manager.PassManager` holds passes to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from thresher.analysis.cost.break_even import BreakEven, Layer, estimated
from thresher.analysis.cost.cost import MachineModel, machine_model
from thresher.approximation.calibration import Calibration
from thresher.approximation.ledger import Spent
from thresher.errors import PassError
from thresher.ir.nodes import module_path, source_line
from thresher.ir.program import Program
from thresher.rewriting.options import has_type_of, names_in, type_name, write_options
from thresher.verification.certificate import Certificate

Kind = Literal["exact", "approximate"]


@dataclass(frozen=True)
class Note:
    """A rewrite or a refusal: the node's name, the path of its module, a sentence, and the line of the user's code."""

    node: str
    module: str
    message: str
    source: str = ""

    @staticmethod
    def at(node: fx.Node, message: str) -> Note:
        """Return the note that says ``message`` of ``node``."""
        return Note(node.name, module_path(node), message, source_line(node))


@dataclass(frozen=True)
class SkippedZeros:
    """A layer whose zeros could be skipped.

    ``kind``: whose zeros (``input``, ``gate``, or the layout of a weight: ``rows``, ``panels``, ``runs``); ``nonzero``: the fraction of
    elements that are not 0; ``saved``: the fraction of the arithmetic that skipping leaves out; ``dense``, ``sparse``: milliseconds without
    and with skipping, ``measured`` or estimated; ``break_even``: the density from which on dense is faster; ``chosen``: skipped or not.
    """

    module: str
    kind: str
    nonzero: float
    saved: float
    dense: float
    sparse: float
    break_even: float
    measured: bool
    chosen: bool


@dataclass
class PassResult:
    """The result of a pass.

    ``rewrites`` is empty where nothing changed; ``program`` is then the one that was passed in. ``refusals`` are the sites that the pass
    looked at and left alone, each with its reason. The rest is for the report: ``certificate`` proves a fold, ``spent`` is what an
    approximate pass spent of the budget, ``zeros`` are the layers whose zeros were looked at.
    """

    program: Program
    rewrites: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)
    certificate: Certificate | None = None
    spent: Spent | None = None
    zeros: Sequence[SkippedZeros] = ()


@dataclass(frozen=True)
class Context:
    """The information that a pass may use besides the program.

    ``target``: as in :func:`thresher.compile`. ``progress`` is called with a message before what takes long. ``machine``: the speed of the
    target; default: a typical one. ``calibration`` and ``budget_fraction`` are for approximate passes: the samples, and the fraction of the
    budget that may be spent after this pass. ``find_break_even``: the seconds that a layer takes dense and skipping zeros; default:
    estimated.
    """

    target: str = "cpu"
    progress: Callable[[str], None] = lambda message: None
    machine: MachineModel = None  # type: ignore[assignment]
    calibration: Calibration | None = None
    budget_fraction: float = 1.0
    find_break_even: Callable[[Layer], BreakEven] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "machine", self.machine or machine_model(self.target))

    def break_even(self, layer: Layer) -> BreakEven:
        """Return the seconds that ``layer`` takes dense and skipping zeros, and so its break-even density."""
        return estimated(layer, self.machine) if self.find_break_even is None else self.find_break_even(layer)


@dataclass(frozen=True)
class Pass:
    """The base of all passes. A subclass is a frozen dataclass that sets ``name`` and implements :meth:`apply`.

    Attributes:
        name: of the pass, in lower case, joined by hyphens.
        requires: names of the passes that must run before it.
        kind: ``exact``: the result computes the same function, which is checked in float64 (1e-9 relative); ``approximate``: see
            :class:`~thresher.rewriting.approximate_pass.ApproximatePass`.
        target_ops: where none of these operators occurs, the pass is skipped; empty: it always runs.
        keeps_copies: it may leave a parameter where one call reads it, and put what it computes of it where another does. Trained apart,
            the two have no way back, and unfolding says so.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[Kind] = "exact"
    target_ops: ClassVar[tuple[Any, ...]] = ()
    keeps_copies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise :class:`PassError` for an option of another type than its default; a subclass that checks more calls this first."""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if not has_type_of(option.default, value):
                wanted = type_name(option.default)
                raise PassError(f"option {option.name!r} of pass {self.name!r} takes {wanted}, not {value!r}")
            if isinstance(value, list):
                object.__setattr__(self, option.name, tuple(value))

    def require(self, holds: bool, option: str, rule: str) -> None:
        """Raise :class:`PassError` that ``option`` must be ``rule``, unless that ``holds``."""
        if not holds:
            raise PassError(f"option {option!r} of pass {self.name!r} must be {rule}, not {getattr(self, option)!r}")

    def apply(self, program: Program, context: Context) -> PassResult:
        """Return the rewritten program, with a note for every rewrite and for every place that was looked at and left alone.

        Args:
            program: well-formed (:meth:`Program.verify`), its shapes and dtypes in ``meta["val"]``. It must not be changed: edit
                ``program.clone()``, and never write into the tensors of its constants, which clones share.
            context: the target and what is known of it.

        Returns:
            A :class:`PassResult` whose program is well-formed again: it takes and returns what it did (structure, shapes, dtypes), every
            constant is read (``clean()`` drops the others), every new call has metadata (``insert_call`` writes it). Where nothing was
            rewritten, ``PassResult(program)`` with the refusals. Applied again to its own result, a pass comes to rest.

        New constants are given in float64 where that is more exact than the dtype their node declares. A constant made from parameters
        leaves a :class:`~thresher.ir.lineage.Restore` in ``program.lineage``, so that training can be carried back to the original.

        Raises:
            PassError: the pass cannot run at all with these options; any other exception is a defect, after which the manager goes on with
                the program as it was and reports the failure.
        """
        raise NotImplementedError

    def require_names(self, option: str, known: Iterable[str]) -> None:
        """Raise :class:`PassError` unless every name in the text of ``option`` is ``known``."""
        unknown = set(names_in(getattr(self, option))) - set(known)
        self.require(not unknown, option, f"some of {', '.join(known)}, joined by plus signs")

    def __str__(self) -> str:
        """The pass as it is written on the command line: ``make_pass(str(p)) == p``."""
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return self.name + write_options(changed)
