"""The pass contract and the manager that holds passes to it.

A pass is a frozen dataclass with a class-level ``name``; its fields are its options, on the command line too
(``"fold-channels{strict=true}"``). ``apply`` takes a program and returns a new one with a note for every rewrite and every
refusal; it never changes its input. The manager checks order, well-formedness and meaning after each pass, reverts a pass
that fails, times it and dumps it.
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import fx

from thresher.analysis.cost.break_even import BreakEven, Layer, estimated
from thresher.analysis.cost.cost import MachineModel, machine_model
from thresher.approximation.calibration import Calibration
from thresher.errors import PassError, ProgramError, ThresherError
from thresher.ir.program import Program, module_path, source_line
from thresher.verification.compare import EXACT_TOLERANCE, Divergence, Observed, compare_programs, observe


@dataclass(frozen=True)
class Note:
    """One rewrite or one refusal: where, and a sentence."""

    node: str
    module: str
    message: str
    source: str = ""

    @staticmethod
    def at(node: fx.Node, message: str) -> Note:
        return Note(node.name, module_path(node), message, source_line(node))


@dataclass
class PassResult:
    """What a pass gives back. ``rewrites`` empty means that nothing changed."""

    program: Program
    rewrites: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)


@dataclass
class Context:
    """What a pass may look at besides the program. ``machine``: what the target does in a second; default: a typical one.
    ``calibration`` is there for approximate passes, and ``share``: the part of the budget that may be spent after this one.
    ``find_break_even``: what a layer takes dense and skipping zeros; default: estimated. ``zeros``: what passes found of them, for the
    report, changed or not."""

    target: str = "cpu"
    progress: Callable[[str], None] = lambda message: None
    machine: MachineModel = None  # type: ignore[assignment]
    calibration: Calibration | None = None
    share: float = 1.0
    find_break_even: Callable[[Layer], BreakEven] | None = None
    zeros: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = self.machine or machine_model(self.target)

    def break_even(self, layer: Layer) -> BreakEven:
        return estimated(layer, self.machine) if self.find_break_even is None else self.find_break_even(layer)


@dataclass(frozen=True)
class Pass:
    """Base of all passes."""

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[Literal["exact", "approximate"]] = "exact"
    target_ops: ClassVar[tuple[Any, ...]] = ()  # where none of these occurs, the pass is skipped; empty: always run

    def apply(self, program: Program, context: Context) -> PassResult:
        raise NotImplementedError

    def __str__(self) -> str:
        changed = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        }
        return self.name + ("{" + ",".join(f"{k}={v}" for k, v in changed.items()) + "}" if changed else "")


# ---------------------------------------------------------------------- registry

_REGISTRY: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make a pass available by its name."""
    if not cls.name:
        raise PassError(f"{cls.__name__} has no name; give it a class-level `name: ClassVar[str]`")
    parameters = cls.__dict__.get(
        "__dataclass_params__"
    )  # its own: a subclass that is no dataclass inherits its parent's
    if parameters is None or not parameters.frozen:
        raise PassError(f"pass {cls.name!r} must be a frozen dataclass: its fields are its options")
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise PassError(f"two passes are named {cls.name!r}: {known.__qualname__} and {cls.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name: the built-in ones, and those of installed packages (entry point group ``thresher.passes``)."""
    import thresher.passes.pipelines  # noqa: F401  (registers the built-in passes)

    for entry in importlib.metadata.entry_points(group="thresher.passes"):
        if entry.name not in _REGISTRY:
            register_pass(entry.load())
    return dict(sorted(_REGISTRY.items()))


def make_pass(spec: str | Pass) -> Pass:
    """A pass from its instance, its name, or ``name{option=value,...}``."""
    if isinstance(spec, Pass):
        return spec
    name, _, options = spec.partition("{")
    passes = registered_passes()
    if name not in passes:
        raise PassError(f"unknown pass {name!r}; known passes: {', '.join(passes)}")
    if options and not options.endswith("}"):
        raise PassError(f"cannot read {spec!r}: options are written name{{option=value,...}}")
    return passes[name](**_parse_options(passes[name], options.removesuffix("}")))


def _parse_options(cls: type[Pass], text: str) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, raw = item.partition("=")
        if key not in fields or not equals:
            known = ", ".join(fields) or "none"
            raise PassError(f"pass {cls.name!r} has no option {item!r}; its options: {known}")
        raw = {"true": "True", "false": "False", "none": "None", "inf": "1e999"}.get(raw.strip().lower(), raw.strip())
        try:
            value = ast.literal_eval(raw)
        except (ValueError, SyntaxError):
            value = raw
        default = fields[key].default
        if isinstance(default, (bool, int, float)) and not isinstance(value, (bool, int, float)):
            raise PassError(f"option {key!r} of pass {cls.name!r} takes a {type(default).__name__}, not {raw!r}")
        values[key] = value
    return values


# ---------------------------------------------------------------------- manager


@dataclass
class PassRecord:
    """What the report says of one pass."""

    name: str
    seconds: float
    status: Literal["changed", "unchanged", "skipped", "reverted"]
    rewrites: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)
    error: float | None = None  # relative float64 error where it was measured
    failure: str = ""
    kind: str = "exact"


@dataclass
class PassManager:
    """Runs passes in order.

    ``verify="each"`` compares the meaning in float64 after every pass that changed something; ``"final"`` (the default) once at
    the end, and only if that fails runs again with ``"each"`` to find and revert the guilty one; ``"off"`` checks
    well-formedness only. Approximate passes are measured by themselves; exact ones after them preserve what they left.
    """

    passes: Sequence[str | Pass]
    verify: Literal["each", "final", "off"] = "final"
    records: list[PassRecord] = field(default_factory=list)
    exact: Program | None = None  # the program before the first approximate pass

    def run(self, program: Program, context: Context | None = None) -> Program:
        context = context or Context()
        chain = [make_pass(p) for p in self.passes]
        _check_order(chain)
        if self.verify not in ("each", "final", "off"):
            raise PassError(f"verify must be 'each', 'final' or 'off', not {self.verify!r}")
        with _no_collections():
            return self._run_stages(chain, program, context)

    def _run_stages(self, chain: Sequence[Pass], program: Program, context: Context) -> Program:
        """Exact passes that follow each other are checked together, approximate ones run each with its share of the budget."""
        done: list[PassRecord] = []
        approximate, spent = sum(p.kind == "approximate" for p in chain), 0
        for exact, group in itertools.groupby(chain, lambda p: p.kind == "exact"):
            if exact:
                program = self._run_and_check(list(group), program, context, len(done))
                done += self.records
                continue
            self.exact = self.exact or program
            for item in group:
                spent += 1
                share = dataclasses.replace(context, share=spent / approximate)
                program = self._run([item], program, share, None, len(done))
                done += self.records
        self.records = done
        return program

    def _run_and_check(self, chain: Sequence[Pass], program: Program, context: Context, number: int) -> Program:
        before = observe(program) if self.verify != "off" else None
        result = self._run(chain, program, context, before if self.verify == "each" else None, number)
        if before is not None and self.verify == "final" and any(r.status == "changed" for r in self.records):
            divergence = compare_programs(before, result)
            if divergence.exceeds(EXACT_TOLERANCE):
                context.progress("the stage is not exact: looking for the pass that broke it")
                result = self._run(chain, program, context, before, number)
            else:
                for record in reversed(self.records):
                    if record.status == "changed":
                        record.error = divergence.relative
                        break
        return result

    def _run(
        self, chain: Sequence[Pass], program: Program, context: Context, before: Observed | None, number: int
    ) -> Program:
        self.records = []
        for index, item in enumerate(chain, number):
            context.progress(f"pass {item.name}")
            start = time.perf_counter()
            if item.target_ops and not any(True for _ in program.calls(*item.target_ops)):
                self.records.append(PassRecord(item.name, 0.0, "skipped", kind=item.kind))
                continue
            record, after = self._apply(item, program, context, before)
            record.seconds = time.perf_counter() - start
            self.records.append(record)
            _dump(index, item, program, after)
            program = after
        return program

    def _apply(
        self, item: Pass, program: Program, context: Context, before: Observed | None
    ) -> tuple[PassRecord, Program]:
        fingerprint = _fingerprint(program)
        record = PassRecord(item.name, 0.0, "unchanged", kind=item.kind)
        try:
            result = item.apply(program, context)
            record.rewrites, record.refusals = result.rewrites, result.refusals
            if _fingerprint(program) != fingerprint:
                raise ProgramError(
                    f"pass {item.name!r} changed the program it was given; it must work on program.clone()"
                )
            if not result.rewrites:
                return record, program
            result.program.verify()
        except ProgramError as error:
            record.status, record.failure = "reverted", str(error)
            if _fingerprint(program) != fingerprint:
                raise PassError(record.failure) from error
            return record, program
        except ThresherError:
            raise
        except Exception as error:
            record.status, record.failure = "reverted", f"{type(error).__name__}: {error}"
            return record, program
        record.status = "changed"
        if before is not None:
            divergence = compare_programs(before, result.program)
            record.error = divergence.relative
            if divergence.exceeds(EXACT_TOLERANCE):
                record.status, record.failure = "reverted", _describe(divergence, program, result.program)
                return record, program
        return record, result.program


@contextmanager
def _no_collections() -> Iterator[None]:
    """Without the cyclic garbage collector: each of its full collections walks every object of torch and of the model, 0.2 s, and
    passes make enough nodes to start several."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _describe(divergence: Divergence, before: Program, after: Program) -> str:
    from thresher.verification.compare import first_divergence

    node = first_divergence(before, after, EXACT_TOLERANCE)
    where = f"; first at node {node.name} ({module_path(node)})" if node is not None else ""
    return f"not exact: relative error {divergence.relative:.2e} > {EXACT_TOLERANCE:.0e} in float64{where}"


def _check_order(chain: Iterable[Pass]) -> None:
    done: set[str] = set()
    for item in chain:
        if missing := [r for r in item.requires if r not in done]:
            raise PassError(f"pass {item.name!r} requires {', '.join(missing)} to run before it")
        done.add(item.name)


def _fingerprint(program: Program) -> tuple:
    graph = tuple((n.op, n.name, n.target, str(n.args), str(n.kwargs)) for n in program.graph.nodes)
    return graph, tuple((name, id(t), t._version) for name, t in program.constants.items())


def _dump(index: int, item: Pass, before: Program, after: Program) -> None:
    """With ``THRESHER_DUMP=dir`` set: the text before the first pass, and the text and the diff after each that changed it."""
    directory = os.environ.get("THRESHER_DUMP")
    if not directory:
        return
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if index == 0:
        (folder / "00-captured.txt").write_text(before.text())
    if after is not before:
        (folder / f"{index + 1:02d}-{item.name}.txt").write_text(after.text())
        (folder / f"{index + 1:02d}-{item.name}.diff").write_text(before.diff(after))
