"""Validation: the lowered code against the rewritten program and against the eager model, on the user's inputs and on random ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thresher.analysis.slices.batch_independence import resized
from thresher.approximation.calibration import Calibration
from thresher.debugging.bisect import first_wrong_operator
from thresher.driver.options import CompileOptions
from thresher.driver.session import Session
from thresher.driver.stages import Build, Captured, lower_again
from thresher.errors import ValidationError
from thresher.runtime.comparison import Check, check_outputs
from thresher.verification.compare import probes
from thresher.verification.rounding import find_undecided_choice, rounding_allowance

OTHER_INPUTS = 8  # that are tried where rounding decides a choice


def validate(
    build: Build, captured: Captured, calibration: Calibration | None, options: CompileOptions, session: Session
) -> tuple[Build, list[Check]]:
    """Return the build and every comparison that can be made here.

    Where a result misses its bound and the code was free to round more, it is built again with strict rounding.

    Raises:
        ValidationError: with the numbers and the operator that diverges first, where ``options.validate`` is ``error``.
    """
    if options.validate == "off":
        return build, []
    with session.stage("validate", "validating"):
        checks = _Comparison(build, captured, calibration, session).all()
        if session.runs_here and not build.lowering_options.strict_rounding and _failed(checks):
            session.progress("a result misses its bound: building with strict rounding")
            build = lower_again(build, replace(build.lowering_options, strict_rounding=True), session)
            checks = _Comparison(build, captured, calibration, session).all()
    if (failed := _failed(checks)) and options.validate == "error":
        messages = [f"{c.name}: error {c.error:.2e} > {c.tolerance:.0e} {c.detail}" for c in failed]
        raise ValidationError("\n".join([*messages, _suspect(build, session)]))
    if failed:
        warnings.warn(f"validation failed: {failed[0].name}, error {failed[0].error:.2e}", stacklevel=4)
    return build, checks


def _failed(checks: Sequence[Check]) -> list[Check]:
    return [c for c in checks if not c.passed]


def _suspect(build: Build, session: Session) -> str:
    """Name the first operator whose lowering alone diverges."""
    operator = first_wrong_operator(build.rewritten.program, session.backend, session.target)
    return f"first operator that diverges: {operator}" if operator else "no single operator diverges when lowered alone"


@dataclass(frozen=True)
class _Comparison:
    """One build and what it is compared with."""

    build: Build
    captured: Captured
    calibration: Calibration | None
    session: Session

    def all(self) -> list[Check]:
        """Compare on the example, on random inputs, for each batch size, and, of an approximate model, on held-out samples."""
        program = self.build.rewritten.program
        example, random = probes(program)
        inputs = [("example input", example, 0), ("random input", random, 0)]
        sizes = sorted(set(self.build.specialized) - {0})
        inputs += [(f"batch of {size}", resized(program, example, size), size) for size in sizes]
        checks = []
        for number, (label, flat, size) in enumerate(inputs):
            checks += self._decided(
                label, flat, range(1 + number, 1 + number + len(inputs) * OTHER_INPUTS, len(inputs)), size
            )
        return [*checks, *self._within_budget()]

    def _decided(self, label: str, flat: tuple, seeds: Sequence[int], size: int) -> list[Check]:
        """Compare on one input; where that fails and rounding decides a choice of this input, on another one."""
        checks, program = self._on(flat, label), self.build.rewritten.program
        choice = find_undecided_choice(program, flat) if _failed(checks) else None
        if choice is None:
            return checks
        others: Iterator[tuple] = (probes(program, seed)[1] for seed in seeds)
        others = (resized(program, other, size) if size else other for other in others)
        clear = next((other for other in others if find_undecided_choice(program, other) is None), None)
        if clear is None:
            return checks
        label = f"another input: rounding decides {choice.name} of the {label}"
        return [*(c for c in checks if c.passed), *self._on(clear, label)]

    def _on(self, flat: tuple, label: str) -> list[Check]:
        """Compare eager, rewritten and compiled on one input."""
        program, exact = self.build.rewritten.program, self.build.rewritten.exact
        reference, rewritten = self.captured.eager(flat), program.run(*flat)
        allowance = rounding_allowance(program, flat)
        unapproximated = rewritten if exact is None else exact.run(*flat)
        checks = [check_outputs(f"rewritten = eager, {label}", reference, unapproximated, allowance)]
        if self.session.runs_here:
            outputs = self._outputs(flat)
            checks.append(check_outputs(f"compiled = rewritten, {label}", rewritten, outputs, allowance))
            if exact is None:
                checks.append(check_outputs(f"compiled = eager, {label}", reference, outputs, allowance))
        return checks

    def _outputs(self, flat: Sequence[Any]) -> list[Any]:
        """Return the flat results of the compiled model; of the rewritten program where the target is not here."""
        program = self.build.rewritten.program
        if not self.session.runs_here:
            return program.run(*flat)
        signature = program.signature(self.session.device)
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
