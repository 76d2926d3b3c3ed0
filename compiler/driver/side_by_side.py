"""A build beside what it must equal: eager model, rewritten program and compiled code on the same inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from thresher.analysis.slices.batch_independence import resized
from thresher.approximation.calibration import Calibration
from thresher.driver.session import Session
from thresher.driver.stages import Build, Captured
from thresher.errors import ValidationError
from thresher.ir.program import Program
from thresher.runtime.comparison import Check, Truth, check_outputs, tolerance_of
from thresher.runtime.reference_run import ReferenceRun
from thresher.runtime.tensor_spec import is_tensor
from thresher.verification.compare import describe, resized_inputs
from thresher.verification.probes import probes
from thresher.verification.rounding import find_undecided_choice, rounding_allowance
from thresher.verification.truth import SampledTruth

OTHER_INPUTS = 8  # that are tried where rounding decides a choice
Run = Callable[[], Sequence[Any]]
_Side = tuple[Run, Callable[[], Truth | None]]  # a reference, and the truth about it


@dataclass(frozen=True)
class Compared:
    """The comparisons on one input: the one that was asked for, or another one, where rounding decides a choice of that."""

    flat: tuple[Any, ...]
    checks: Sequence[Check]


@dataclass(frozen=True)
class SideBySide:
    """One build and what it is compared with."""

    build: Build
    captured: Captured
    calibration: Calibration | None
    session: Session

    @property
    def program(self) -> Program:
        """The rewritten program, which was lowered."""
        return self.build.rewritten.program

    def compare(self) -> list[Compared]:
        """Compare on the example, on random inputs, at other sizes, and, of an approximate model, on held-out samples.

        Other sizes are those of the batch that there is code for; without such code, any others, where sizes are free.

        Raises :class:`ValidationError` where the model itself fails on the example.
        """
        example, random = probes(self.program)
        inputs = [("example input", example, 0), ("random input", random, 0)]
        sizes = sorted(set(self.build.specialized) - {0})
        inputs += [(f"batch of {size}", resized(self.program, example, size), size) for size in sizes]
        if not sizes and (other := resized_inputs(self.captured.program, random)) is not None:
            inputs.append(("other sizes", other, 0))
        compared = []
        for number, (label, flat, size) in enumerate(inputs):
            seeds = range(1 + number, 1 + number + len(inputs) * OTHER_INPUTS, len(inputs))
            compared.append(self._decided(label, flat, seeds, size))
        return [*compared, Compared((), self._within_budget())]

    def captured_otherwise(self, compared: Sequence[Compared]) -> bool:
        """Return whether the program as it was captured, before any pass, differs from the model on one of these inputs.

        Models ask whether they are exported, and some of them compute something else then.
        """
        failed = [c.flat for c in compared if any(not check.passed and " = eager" in check.name for check in c.checks)]
        return any(map(self._captured_otherwise, failed))

    def _captured_otherwise(self, flat: tuple) -> bool:
        reference, program = self.captured.eager(flat), self.captured.program
        eager = lambda: reference, functools.partial(_truth, program, flat)
        return not self._check("captured = eager", eager, lambda: program.run(*flat), flat).passed

    def reference_run(self, flat: Sequence[Any], judged: bool = True) -> ReferenceRun:
        """Return the run on ``flat`` with which an artifact proves itself; of an approximate model that of the rewritten program.

        Unless ``judged`` is False, the truth goes with it where the rounding of the reference itself is more than half of what is allowed:
        whoever loads the artifact cannot run the model.
        """
        program = self.captured.program if self.build.rewritten.exact is None else self.program
        outputs = self.captured.eager(flat) if program is self.captured.program else program.run(*flat)
        truth = _truth(program, flat) if judged else None
        needed = truth is not None and any(
            truth.error(i, value) > tolerance_of(value) / 2 for i, value in enumerate(outputs) if is_tensor(value)
        )
        settled = truth.settled() if truth is not None and needed else None
        return ReferenceRun.of(flat, outputs, rounding_allowance(self.program, flat), settled)

    def _decided(self, label: str, flat: tuple, seeds: Sequence[int], size: int) -> Compared:
        """Compare on one input; where that fails, or needs an excuse, and rounding decides a choice of this input, on another one.

        Where the code cannot run here, nothing fails here that may fail there.
        """
        checks = self._on(flat, label)
        doubtful = not self.session.runs_here or any(c.excused or not c.passed for c in checks)
        choice = self._choice(flat) if doubtful else None
        if choice is None:
            return Compared(flat, checks)
        for seed in seeds:
            other = probes(self.program, seed)[1]
            other = resized(self.program, other, size) if size else other
            if self._runs(other) and self._choice(other) is None:
                label = f"another input: rounding decides {choice.name} of the {label}"
                return Compared(other, [*(c for c in checks if c.passed and not c.excused), *self._on(other, label)])
        return Compared(flat, checks)

    def _choice(self, flat: tuple) -> fx.Node | None:
        try:
            return find_undecided_choice(self.program, flat)
        except Exception:  # the program cannot be run in float64
            return None

    def _runs(self, flat: tuple) -> bool:
        try:
            self.captured.eager(flat)
        except Exception:  # whatever an operator of torch raises
            return False
        return True

    def _on(self, flat: tuple, label: str) -> list[Check]:
        """Compare eager, rewritten and compiled on one input; say so where the model itself fails on it."""
        exact = self.build.rewritten.exact
        try:
            reference = self.captured.eager(flat)
        except Exception as error:  # whatever an operator of torch raises
            if flat is self.program.probe:
                raise ValidationError(f"the model itself fails on the example input: {describe(error)}") from error
            return [Check.not_made(f"compiled = eager, {label}", f"the model itself fails on it: {describe(error)}")]
        eager: _Side = lambda: reference, functools.cache(functools.partial(_truth, self.captured.program, flat))
        rewritten = (
            functools.cache(lambda: self.program.run(*flat)),
            functools.cache(functools.partial(_truth, self.program, flat)),
        )
        if exact is None:
            checks = [self._check(f"rewritten = eager, {label}", eager, rewritten[0], flat)]
        else:  # what is approximate differs, within its budget
            checks = [self._check(f"exact passes = eager, {label}", eager, lambda: exact.run(*flat), flat)]
        if self.session.runs_here:
            compiled = functools.cache(lambda: self._outputs(flat))
            checks.append(self._check(f"compiled = rewritten, {label}", rewritten, compiled, flat))
            if exact is None:
                checks.append(self._check(f"compiled = eager, {label}", eager, compiled, flat))
        return checks

    def _check(self, name: str, reference: _Side, candidate: Run, flat: tuple) -> Check:
        """Compare two sides; where one cannot run although the model can, that is wrong."""
        run, truth = reference
        try:
            return check_outputs(name, run(), candidate(), rounding_allowance(self.program, flat), truth)
        except Exception as error:  # of torch, of TVM, or our own
            return Check(name, math.inf, 0.0, False, f"the model runs, but here is {describe(error)}")

    def _outputs(self, flat: Sequence[Any]) -> list[Any]:
        """Return the flat results of the compiled model; of the rewritten program where the target is not here."""
        if not self.session.runs_here:
            return self.program.run(*flat)
        signature = self.program.signature(self.session.device)
        return signature.with_literals(self.build.executable.run(signature.check(flat)))

    def _within_budget(self) -> list[Check]:
        """Compare the approximate model with the eager one, on the held-out samples."""
        calibration = self.calibration
        if self.build.rewritten.exact is None or calibration is None:
            return []
        errors = [calibration.distance(flat, self._outputs(flat)) for flat in calibration.held_out_samples]
        measured, limit = calibration.budget.summary(errors, calibration.rows), calibration.budget.limit
        subject = "compiled" if self.session.runs_here else "rewritten"
        name = f"{subject} ~ eager, {calibration.budget.name}, held-out samples"
        passed = measured.bound <= limit * (1 + 1e-3)
        return [Check(name, measured.mean, limit, passed, f"worst sample {measured.worst:.2e}")]


def _truth(program: Program, flat: Sequence[Any]) -> SampledTruth | None:
    """Return the truth of ``program`` on one input; None where it cannot be run in float64."""
    try:
        return SampledTruth(program, flat)
    except Exception:  # an operator that torch has not in float64
        return None
