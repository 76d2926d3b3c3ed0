"""Judges one application of a pass to one program: each fault is a finding of the check that saw it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thresher.approximation.calibration import Calibration
from thresher.errors import ProgramError
from thresher.ir.free_sizes import sizes_kept_free
from thresher.ir.lineage import Restore, TrainedApart, unfold
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Pass, PassResult
from thresher.rewriting.defects import check_result, describe
from thresher.testing.comparisons import (
    Snapshot,
    difference,
    divergence,
    faults_of_notes,
    inputs_of,
    new_precision,
    signature_change,
)

TRAINING_TOLERANCE = 1e-4  # relative: the parameters that come back are rounded to float32
ROUNDS = 10  # applications after which a pass must have come to rest


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``check`` is one of the names of :mod:`thresher.testing.proof`, ``where`` the case and its sizes."""

    check: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.message}"


@dataclass(frozen=True)
class Judge:
    """A pass, what it may look at, and the seed of what is drawn."""

    item: Pass
    context: Callable[[Program], Context]
    seed: int

    def apply(self, program: Program, where: str) -> tuple[PassResult | None, list[Finding]]:
        """Return the result, None where there is none, and what was wrong with the way there."""
        before = Snapshot.of(program)
        try:
            with sizes_kept_free(program):
                result = check_result(self.item, self.item.apply(program, self.context(program)))
        except ProgramError as error:
            return None, [Finding("raises", where, str(error))]
        except Exception as error:
            return None, [Finding("raises", where, describe(self.item, error))]
        wrong = [Finding("input", where, message) for message in before.changes(program)]
        try:
            with sizes_kept_free(program):
                result.program.verify()
        except Exception as error:
            wrong.append(Finding("well-formed", where, str(error)))
            return None, wrong
        return result, wrong

    def judge(self, program: Program, result: PassResult, where: str) -> Iterator[Finding]:
        """Yield what is wrong with a result."""
        after = result.program
        yield from (Finding("notes", where, fault) for fault in faults_of_notes(program, result))
        if not result.rewrites:
            return
        if message := signature_change(program, after):
            yield Finding("signature", where, message)
            return
        if message := new_precision(program, after):
            yield Finding("precision", where, message)
        again, _ = self.apply(program, where)
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
            result, wrong = self.apply(after, where)
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

    def way_back(
        self,
        original: Program,
        state: Mapping[str, Tensor],
        after: Program,
        where: str,
        before: Program | None = None,
        restored: bool = False,
    ) -> Iterator[Finding]:
        """Yield what is wrong where parameters move a little, as in training, and what comes back is put into the program as it was.

        First all of those that have a way back; where that is wrong, one after the other, to name the one that it is wrong for; where it
        is right, none, as it is without training. With ``restored`` those that have none are wrong, too.
        ``before``: the program that the pass was applied to, if passes ran before: copies that these keep are not its own.
        """
        training = _Training(original, state, after.rounded(), after.lineage, self.seed)
        try:
            ways = {name: training.way_back(name) for name in sorted(training.small.trainable())}
            returning = [name for name, hindrance in ways.items() if hindrance is None]
            fault = training.fault(returning)
            single = next((name for name in returning if fault and training.fault([name])), "")
            untrained = "" if fault or not training.finite else training.difference(training.small)
        except Exception as error:
            yield Finding("way back", where, f"unfolding raises {type(error).__name__}: {error}")
            return
        if fault:
            what = f"where {single!r} alone is" if single else "where parameters are"
            yield Finding(
                "way back", where, f"{what} trained and unfolded, the original computes something else: {fault}"
            )
        if untrained:
            yield Finding("way back", where, f"unfolded as it is, the original computes something else: {untrained}")
        lost = [name for name, error in ways.items() if error is not None and not isinstance(error, TrainedApart)]
        if restored and lost:
            cure = "leave a Restore in the lineage, or add it with role=Role.BUFFER"
            yield Finding("way back", where, f"{lost[0]!r} leads back to no parameter of the model: {cure}")
        apart = next((error for error in ways.values() if isinstance(error, TrainedApart)), None)
        if apart and not self.item.keeps_copies and not (before and self._is_apart(original, state, before)):
            cure = "refuse where a constant is read elsewhere, too, or say keeps_copies = True"
            yield Finding("way back", where, f"{apart}: {cure}")

    def _is_apart(self, original: Program, state: Mapping[str, Tensor], before: Program) -> bool:
        training = _Training(original, state, before.rounded(), before.lineage, self.seed)
        return any(isinstance(training.way_back(name), TrainedApart) for name in training.small.trainable())


@dataclass(frozen=True)
class _Training:
    """A result whose parameters are trained, and the way back to the ``original`` program, whose parameters are ``state``."""

    original: Program
    state: Mapping[str, Tensor]
    small: Program
    lineage: Sequence[Restore]
    seed: int

    @property
    def finite(self) -> bool:
        """Return whether all numbers of the result are: else the model itself has none to compare."""
        return all(bool(torch.isfinite(value).all()) for value in self.small.constants.values())

    def way_back(self, name: str) -> ProgramError | None:
        """Return why there is no way back for a parameter that is trained; None where there is one."""
        try:
            self._unfolded(self._trained([name]))
        except ProgramError as error:
            return error
        return None

    def fault(self, names: Sequence[str]) -> str:
        """Return how far the original is from the result where these parameters are trained; empty where they are equal."""
        try:
            return self.difference(self._trained(names))
        except ProgramError:  # each has a way back alone, and two copies have none
            return ""

    def difference(self, trained: Program) -> str:
        """Return how far the original is from the result with what comes back; raises :class:`ProgramError` where there is no way."""
        unfolded = self._unfolded(trained)
        broken = (n for n, v in unfolded.items() if not torch.isfinite(v).all() and torch.isfinite(self.state[n]).all())
        if self.finite and (name := next(broken, "")):
            return f"{name!r} comes back with numbers that are not finite"
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
