"""Run passes in order, and hold them to their contract.

The manager checks order, well-formedness and meaning after each pass, keeps free sizes free, goes back to the program before a pass that
fails, times passes, and dumps what they do.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from thresher.approximation.ledger import Spent
from thresher.errors import PassError, ProgramError, ThresherError
from thresher.ir.free_sizes import sizes_kept_free
from thresher.ir.nodes import module_path
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult, SkippedZeros
from thresher.rewriting.defects import check_result, describe
from thresher.rewriting.registry import make_pass
from thresher.runtime.comparison import Check
from thresher.verification.certificate import Certificate
from thresher.verification.compare import (
    EXACT_TOLERANCE,
    Divergence,
    Observed,
    compare_programs,
    first_divergence,
    observe,
)


@dataclass
class PassRecord:
    """The report's entry for one pass.

    ``error`` is the relative float64 error where it was measured; ``failure`` says why a pass was reverted.
    """

    name: str
    seconds: float
    status: Literal["changed", "unchanged", "skipped", "reverted"]
    rewrites: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)
    error: float | None = None
    failure: str = ""
    kind: str = "exact"


@dataclass
class Applied:
    """A pass that ran (or was skipped): its record, and its result where it gave one."""

    record: PassRecord
    result: PassResult | None = None

    @property
    def changed(self) -> bool:
        """True if the pass changed the program, and the change was kept."""
        return self.record.status == "changed"


@dataclass
class PassManager:
    """A sequence of passes, and after :meth:`run` what became of each.

    ``verify="each"`` compares the meaning in float64 after every pass that changed something; ``"final"`` (the default) once at
    the end, and only if that fails runs again with ``"each"`` to find and revert the pass that failed; ``"off"`` checks
    well-formedness only. Approximate passes are measured by themselves; exact ones after them preserve what they left. ``watch`` is called
    after each pass with its record and the programs before and after it.

    After :meth:`run`, ``applied`` has an entry for every pass, ``exact`` is the program before the first approximate one, and ``unmade``
    are comparisons that could not be made, because the program itself fails on a random input.
    """

    passes: Sequence[str | Pass]
    verify: Literal["each", "final", "off"] = "final"
    watch: Callable[[PassRecord, Program, Program], None] = lambda record, before, after: None
    applied: list[Applied] = field(default_factory=list)
    exact: Program | None = None
    unmade: list[Check] = field(default_factory=list)

    @property
    def records(self) -> list[PassRecord]:
        """The report's entry for each pass."""
        return [a.record for a in self.applied]

    @property
    def certificate(self) -> Certificate | None:
        """The proof of the last fold that was kept; None where nothing was folded."""
        certificates = [a.result.certificate for a in self.applied if a.changed and a.result and a.result.certificate]
        return certificates[-1] if certificates else None

    @property
    def ledger(self) -> list[Spent]:
        """The spending of each approximate pass that was kept."""
        return [a.result.spent for a in self.applied if a.changed and a.result and a.result.spent]

    @property
    def zeros(self) -> list[SkippedZeros]:
        """The layers whose zeros were looked at, skipped or not."""
        return [zero for a in self.applied if a.result for zero in a.result.zeros]

    def run(self, program: Program, context: Context | None = None) -> Program:
        """Return the rewritten program; ``program`` itself stays as it is.

        Raises :class:`PassError` for an unknown pass, a wrong option, a wrong order, or a pass that changes the program it is given.
        """
        context = context or Context()
        chain = [make_pass(p) for p in self.passes]
        _check_order(chain)
        if self.verify not in ("each", "final", "off"):
            raise PassError(f"verify must be 'each', 'final' or 'off', not {self.verify!r}")
        self.applied, self.exact, self.unmade = [], None, []
        with _no_collections():
            return self._run_stages(chain, program, context)

    def _run_stages(self, chain: Sequence[Pass], program: Program, context: Context) -> Program:
        """Exact passes that follow each other are checked together, approximate ones run each with its fraction of the budget."""
        approximate, spent = sum(p.kind == "approximate" for p in chain), 0
        for exact, group in itertools.groupby(chain, lambda p: p.kind == "exact"):
            if exact:
                program, applied = self._run_and_check(list(group), program, context)
                self.applied += applied
                continue
            self.exact = self.exact or program
            for item in group:
                spent += 1
                limited = dataclasses.replace(context, budget_fraction=spent / approximate)
                program, applied = self._run([item], program, limited, None)
                self.applied += applied
        return program

    def _run_and_check(
        self, chain: Sequence[Pass], program: Program, context: Context
    ) -> tuple[Program, list[Applied]]:
        before = observe(program) if self.verify != "off" else None
        result, applied = self._run(chain, program, context, before if self.verify == "each" else None)
        changed = [a for a in applied if a.changed]
        if before is not None and before.skipped and changed:
            name = f"{changed[0].record.name} to {changed[-1].record.name} in float64, random input"
            self.unmade.append(Check.not_made(name, f"the model itself fails on it: {before.skipped}"))
        if before is None or self.verify != "final" or not changed:
            return result, applied
        divergence = compare_programs(before, result)
        if divergence.exceeds(EXACT_TOLERANCE):
            context.progress("the stage is not exact: looking for the pass that broke it")
            return self._run(chain, program, context, before)
        changed[-1].record.error = divergence.relative
        return result, applied

    def _run(
        self, chain: Sequence[Pass], program: Program, context: Context, before: Observed | None
    ) -> tuple[Program, list[Applied]]:
        done: list[Applied] = []
        for index, item in enumerate(chain, len(self.applied)):
            context.progress(f"pass {item.name}")
            start = time.perf_counter()
            if item.target_ops and not any(True for _ in program.calls(*item.target_ops)):
                done.append(Applied(PassRecord(item.name, 0.0, "skipped", kind=item.kind)))
                self.watch(done[-1].record, program, program)
                continue
            applied, after = _apply(item, program, context, before)
            applied.record.seconds = time.perf_counter() - start
            done.append(applied)
            _dump(index, item, program, after)
            self.watch(applied.record, program, after)
            program = after
        return program, done


def _apply(item: Pass, program: Program, context: Context, before: Observed | None) -> tuple[Applied, Program]:
    """Apply one pass; ``before``: what its result is compared with. A pass that fails leaves the program as it was."""
    fingerprint = _fingerprint(program)
    applied = Applied(PassRecord(item.name, 0.0, "unchanged", kind=item.kind))
    record = applied.record
    try:
        with sizes_kept_free(program):
            applied.result = result = check_result(item, item.apply(program, context))
            record.rewrites, record.refusals = result.rewrites, result.refusals
            if _fingerprint(program) != fingerprint:
                raise ProgramError(
                    f"pass {item.name!r} changed the program it was given; it must work on program.clone()"
                )
            if not result.rewrites:
                return applied, program
            result.program.verify()
    except ProgramError as error:
        record.status, record.failure = "reverted", str(error)
        if _fingerprint(program) != fingerprint:
            raise PassError(record.failure) from error
        return applied, program
    except ThresherError:
        raise
    except Exception as error:
        record.status, record.failure = "reverted", describe(item, error)
        return applied, program
    record.status = "changed"
    if before is not None:
        divergence = compare_programs(before, result.program)
        record.error = divergence.relative
        if divergence.exceeds(EXACT_TOLERANCE):
            record.status, record.failure = "reverted", _describe(divergence, program, result.program)
            return applied, program
    return applied, result.program


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
