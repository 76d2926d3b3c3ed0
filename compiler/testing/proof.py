"""Everything that a pass must hold to, tried on a case in many sizes. Each thing that is wrong is named once, by the check that saw it.

input        the program it was given is as it was, its constants and metadata too
raises       it does not raise
well-formed  the result is a program (``Program.verify``): nothing dangles, and shapes and dtypes are what the operators yield
signature    the model takes and returns what it did: structure, shapes, dtypes
precision    floating-point numbers are of no type that was not there before
exact        the result is equal in float64 (1e-9) on the example, random, scaled, zero and negative inputs
strides      also for inputs that do not lie in memory one after the other
aliasing     also if one tensor is passed for several inputs
batch        also for a number of samples that was left free
dtypes       all of this for the model in float64, float16 and bfloat16
notes        what it changed, it says, at nodes that exist; what it says, it changed
repeatable   two applications give the same
way back     what training does to the result comes back to the original's parameters, or an error says that it cannot
rest         applied again and again it comes to an end, and stays exact
near miss    a graph one step off is refused, or rewritten rightly, too (:mod:`thresher.testing.near_miss_graphs`)
budget       (approximate passes) the error of the result on samples that it did not see keeps within the budget
idle         (of a case) the pass rewrote nothing in any size: the case tests nothing
unmet        (of a case) with one value of a size the pass rewrote nothing, and the case does not say that this is meant
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from thresher.approximation.calibration import Calibration
from thresher.errors import CaptureError, ProgramError
from thresher.frontend.capture import capture
from thresher.ir.lineage import Restore, TrainedApart, unfold
from thresher.ir.program import Program
from thresher.passes.pipelines import resolve
from thresher.rewriting.contract import Context, Pass, PassResult
from thresher.rewriting.defects import check_result, describe
from thresher.rewriting.manager import PassManager
from thresher.rewriting.registry import make_pass
from thresher.testing.cases import Case, described
from thresher.testing.comparisons import (
    Snapshot,
    difference,
    divergence,
    faults_of_notes,
    inputs_of,
    new_precision,
    signature_change,
)
from thresher.testing.near_miss_graphs import near_misses

DTYPES = (torch.float64, torch.float16, torch.bfloat16)
TRAINING_TOLERANCE = 1e-4  # relative: the parameters that come back are rounded to float32
ROUNDS = 10  # applications after which a pass must have come to rest


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``check`` is one of the names above, ``where`` the case and its sizes, ``message`` says what it is."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


def prove(item: str | Pass, *cases: Case, **options: Any) -> None:
    """Examine a pass (:func:`examine` has the arguments). Raises :class:`AssertionError` with all findings, if there are any."""
    if findings := examine(item, *cases, **options):
        raise AssertionError("\n".join(map(str, findings)))


def examine(
    item: str | Pass,
    *cases: Case,
    first: Sequence[str | Pass] = (),
    draws: int | None = None,
    misses: int = 120,
    dtypes: Sequence[torch.dtype] = DTYPES,
    context: Callable[[Program], Context] | None = None,
    seed: int = 0,
    every: bool = False,
) -> list[Finding]:
    """Try a pass on cases and say what is wrong.

    Args:
        item: the pass, or ``name{option=value}``.
        cases: models; the pass is expected to rewrite each of them in at least one size.
        first: passes, or names of pipelines, that run before it (and are not judged).
        draws: sizes of each case that are tried, at most; default: so many that any two values of its sizes occur together.
        misses: graphs one step off that are tried, per case.
        dtypes: of the models that are tried besides the one in float32.
        context: what the pass may look at, made for each program; approximate passes need a ``calibration`` in it.
        every: return all findings, not only the first of each check and case.

    Returns: one finding for each check and case that failed, the first one found.
    """
    chosen = make_pass(item)
    findings: list[Finding] = []
    for case in cases:
        trial = _Trial(chosen, case, list(first), context or (lambda program: Context()), seed)
        seen: dict[Any, Finding] = {}
        for finding in trial.run(draws, misses, dtypes):
            seen.setdefault(finding if every else finding.check, finding)
        findings += seen.values()
    return findings


@dataclass
class _Trial:
    """One pass on one case."""

    item: Pass
    case: Case
    first: list[str | Pass]
    context: Callable[[Program], Context]
    seed: int

    def run(self, draws: int | None, misses: int, dtypes: Sequence[torch.dtype]) -> Iterator[Finding]:
        active = False
        drawn: list[tuple[str, Any]] = []  # values need not be hashable
        met: list[tuple[str, Any]] = []
        for sizes in self.case.draws(draws, self.seed):
            where = described(self.case, sizes)
            drawn += [item for item in sizes.items() if item not in drawn]
            captured = self.case.program(sizes)
            program = self._prepared(captured)
            result, wrong = self._apply(program, where)
            yield from wrong
            if result is None:
                continue
            yield from self._judge(program, result, where)
            if not result.rewrites:
                continue
            met += sizes.items()
            if self.item.kind == "exact":
                yield from self._batch(sizes, where)
                yield from self._way_back(captured, captured.original.state, result.program, where)
            if not active:  # once: what follows does not depend on sizes
                active = True
                yield from self._dtypes(sizes, where, dtypes)
                yield from self._near_misses(program, result, where, misses)
        if not active:
            yield Finding("idle", self.case.name, f"{self.item} rewrote nothing, in no size")
            return
        for size, value in drawn:
            meant, seen = value in self.case.refused.get(size, ()), (size, value) in met
            if not seen and not meant:
                cure = f"Case(..., refused={{{size!r}: ({value!r},)}})"
                yield Finding("unmet", self.case.name, f"{size}={value}: no rewrite seen; if that is meant, say {cure}")
            if seen and meant:
                yield Finding("unmet", self.case.name, f"{size}={value} is said to be refused, and was rewritten")

    def _prepared(self, program: Program) -> Program:
        passes = resolve(self.first)
        return PassManager(passes, "off").run(program, self.context(program)) if passes else program

    def _apply(self, program: Program, where: str) -> tuple[PassResult | None, list[Finding]]:
        """The result, and what was wrong with the way there."""
        before = Snapshot.of(program)
        try:
            result = check_result(self.item, self.item.apply(program, self.context(program)))
        except ProgramError as error:
            return None, [Finding("raises", where, str(error))]
        except Exception as error:
            return None, [Finding("raises", where, describe(self.item, error))]
        wrong = [Finding("input", where, message) for message in before.changes(program)]
        try:
            result.program.verify()
        except Exception as error:
            wrong.append(Finding("well-formed", where, str(error)))
            return None, wrong
        return result, wrong

    # ------------------------------------------------------------------ one program

    def _judge(self, program: Program, result: PassResult, where: str) -> Iterator[Finding]:
        after = result.program
        yield from (Finding("notes", where, fault) for fault in faults_of_notes(program, result))
        if not result.rewrites:
            return
        if message := signature_change(program, after):
            yield Finding("signature", where, message)
            return
        if message := new_precision(program, after):
            yield Finding("precision", where, message)
        again, _ = self._apply(program, where)
        if again is not None and (message := difference(after, again.program)):
            yield Finding("repeatable", where, message)
        if self.item.kind == "exact":
            yield from self._exact(program, after, where)
            yield from self._rest(program, after, where)
        else:
            yield from self._budget(program, after, where)

    def _exact(self, program: Program, after: Program, where: str) -> Iterator[Finding]:
        for check, inputs, flat in inputs_of(program):
            if differs := divergence(program, after, flat):
                yield Finding(check, where, f"{inputs}: {differs}")

    def _rest(self, program: Program, after: Program, where: str) -> Iterator[Finding]:
        for _ in range(ROUNDS):
            result, wrong = self._apply(after, where)
            if result is None:
                yield from (replace(w, check="rest") for w in wrong)
                return
            if not result.rewrites:
                break
            after = result.program
        else:
            yield Finding("rest", where, f"after {ROUNDS} applications it still rewrites")
        if differs := divergence(program, after, program.probe):
            yield Finding("rest", where, f"applied again it is not exact: {differs}")

    def _budget(self, program: Program, after: Program, where: str) -> Iterator[Finding]:
        calibration = self.context(program).calibration
        if not isinstance(calibration, Calibration):
            yield Finding("budget", where, "an approximate pass needs a context with a calibration")
            return
        limit, error = calibration.budget.limit, calibration.measure(after, calibration.held_out_samples).mean
        if not error <= limit:
            yield Finding("budget", where, f"the error on held-out samples is {error:.3g}, the budget {limit:.3g}")

    def _way_back(
        self, original: Program, state: Mapping[str, Tensor], after: Program, where: str
    ) -> Iterator[Finding]:
        """Parameters move a little, as in training; then what comes back is put into the program as it was.

        First all of those that have a way back; where that is wrong, one after the other, to name the one that it is wrong for.
        """
        training = _Training(original, state, after.rounded(), after.lineage, self.seed)
        try:
            ways = {name: training.way_back(name) for name in sorted(training.small.trainable())}
            returning = [name for name, hindrance in ways.items() if hindrance is None]
            fault = training.fault(returning)
            single = next((name for name in returning if fault and training.fault([name])), "")
        except Exception as error:
            yield Finding("way back", where, f"unfolding raises {type(error).__name__}: {error}")
            return
        if fault:
            what = f"where {single!r} alone is" if single else "where parameters are"
            yield Finding(
                "way back", where, f"{what} trained and unfolded, the original computes something else: {fault}"
            )
        apart = next((error for error in ways.values() if isinstance(error, TrainedApart)), None)
        if apart and not self.item.keeps_copies:
            cure = "refuse where a constant is read elsewhere, too, or say keeps_copies = True"
            yield Finding("way back", where, f"{apart}: {cure}")

    # ------------------------------------------------------------------ other captures

    def _dtypes(self, sizes: dict[str, Any], where: str, dtypes: Sequence[torch.dtype]) -> Iterator[Finding]:
        for dtype in dtypes:
            variant = f"{where} in {str(dtype).removeprefix('torch.')}"
            try:
                program = self._prepared(self.case.program(sizes, dtype))
            except CaptureError:  # the model has no such type
                continue
            result, wrong = self._apply(program, variant)
            yield from (replace(w, check="dtypes", message=f"{w.check}: {w.message}") for w in wrong)
            if result is None or not result.rewrites:
                continue
            message = signature_change(program, result.program) or new_precision(program, result.program)
            if not message and self.item.kind == "exact":
                message = divergence(program, result.program, program.probe)
            if message:
                yield Finding("dtypes", variant, message)

    def _batch(self, sizes: dict[str, Any], where: str) -> Iterator[Finding]:
        """Captured with the first dimension of all inputs free, where the model allows that; run with two more samples."""
        model, args = self.case.module(sizes)
        if not args or not all(isinstance(a, Tensor) and a.dim() and len(a) == len(args[0]) > 1 for a in args):
            return
        try:
            program = capture(model, args, dynamic_shapes=_free(model, len(args)))
        except Exception:  # the model needs just this number
            return
        program = self._prepared(program)
        result, wrong = self._apply(program, where)
        yield from (replace(w, check="batch", message=f"{w.check}: {w.message}") for w in wrong)
        if result is not None and result.rewrites:
            more = [torch.cat([a, a[:2].flip(0)]) for a in args]
            if differs := divergence(program, result.program, more):
                yield Finding("batch", where, f"with {len(more[0])} samples instead of {len(args[0])}: {differs}")

    def _near_misses(self, program: Program, result: PassResult, where: str, limit: int) -> Iterator[Finding]:
        """Graphs one step off go through all checks of a program, the way back included.

        A pass that keeps copies has none where a constant is read twice.
        """
        if self.item.kind != "exact":
            return
        for change, other in near_misses(program, {n.node for n in result.rewrites}, limit, self.seed):
            other.lineage.clear()  # its parameters are as they are here, whatever came before
            outcome, wrong = self._apply(other, where)
            if outcome is not None:
                wrong += self._judge(other, outcome, where)
            copies = self.item.keeps_copies and any(len(n.users) > 1 for n in other.graph.nodes if n.op == "get_attr")
            if outcome is not None and outcome.rewrites and not copies:
                wrong += self._way_back(other, other.constants, outcome.program, where)
            yield from (Finding("near miss", where, f"where {change}: {one.check}: {one.message}") for one in wrong)


@dataclass(frozen=True)
class _Training:
    """A result whose parameters are trained, and the way back to the ``original`` program, whose parameters are ``state``."""

    original: Program
    state: Mapping[str, Tensor]
    small: Program
    lineage: Sequence[Restore]
    seed: int

    def way_back(self, name: str) -> ProgramError | None:
        """Return why there is no way back for a parameter that is trained; None where there is one."""
        try:
            self._unfolded(self._trained([name]))
        except ProgramError as error:
            return error
        return None

    def fault(self, names: Sequence[str]) -> str:
        """Return how far the original is from the result where these parameters are trained; empty where they are equal."""
        trained = self._trained(names)
        try:
            unfolded = self._unfolded(trained)
        except ProgramError:  # each has a way back alone, and two copies have none
            return ""
        original = self.original.clone()
        original.constants |= {name: value for name, value in unfolded.items() if name in original.constants}
        return divergence(original, trained, original.probe, TRAINING_TOLERANCE)

    def _trained(self, names: Sequence[str]) -> Program:
        trained, generator = self.small.clone(), torch.Generator().manual_seed(self.seed)
        for name in names:
            value = self.small.constants[name]
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
            trained.constants[name] = value * (1 + 0.01 * noise)
        return trained

    def _unfolded(self, trained: Program) -> dict[str, Tensor]:
        return unfold(self.state, self.lineage, self.small.constants, trained.constants)


def _free(model: nn.Module, count: int) -> tuple:
    """The first dimension of so many inputs, for torch.export: what ``*inputs`` takes is nested."""
    batch = torch.export.Dim("batch", min=2)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    shapes = tuple({0: batch} for _ in range(count))
    single = next((i for i, kind in enumerate(kinds) if kind is inspect.Parameter.VAR_POSITIONAL), count)
    return shapes if single >= count else (*shapes[:single], shapes[single:])
