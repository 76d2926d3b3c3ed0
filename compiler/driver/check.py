"""Validation: the lowered code against the rewritten program and against the eager model, on the user's inputs and on random ones.

Where a result misses the bound of its dtype, the model in float64 judges (:mod:`thresher.verification.truth`). What that excuses in the
compiled code is looked at once more, in parts that are too short to amplify their rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from thresher.approximation.calibration import Calibration
from thresher.debugging.bisect import first_wrong_operator
from thresher.driver.options import CompileOptions
from thresher.driver.session import Session
from thresher.driver.side_by_side import Compared, SideBySide
from thresher.driver.stages import Build, Captured, lower_again
from thresher.errors import ValidationError
from thresher.runtime.comparison import Check
from thresher.runtime.reference_run import ReferenceRun


@dataclass(frozen=True)
class Validated:
    """A build, every comparison that was made of it, and the run with which its artifact proves itself."""

    build: Build
    checks: Sequence[Check]
    reference_run: ReferenceRun


def validate(
    build: Build, captured: Captured, calibration: Calibration | None, options: CompileOptions, session: Session
) -> Validated:
    """Return the build with every comparison that can be made here.

    Where a result misses the bound of its dtype and the code rounds more than the operators do, it is built again with strict rounding: the
    model in float64 excuses what eager torch rounds in such a model, and not ten times that.

    Raises:
        ValidationError: with the numbers and the operator that diverges first, where ``options.validate`` is ``error``.
    """
    sides = SideBySide(build, captured, calibration, session)
    if options.validate == "off":
        return Validated(build, [], sides.reference_run(build.rewritten.program.probe, judged=False))
    with session.stage("validate", "validating"):
        compared = sides.compare()
        if session.runs_here and build.executable.rounds_more and any(map(_of_code, _doubtful(compared))):
            session.progress("a result misses its bound: building with strict rounding")
            build = lower_again(build, replace(build.lowering_options, strict_rounding=True), session)
            sides = replace(sides, build=build)
            compared = sides.compare()
        suspect = _confirm(compared, build, session)
        reference_run = sides.reference_run(compared[0].flat)
    if (wrong := _wrong(compared)) and options.validate == "error":
        raise ValidationError("\n".join([*map(str, wrong), suspect or "no part diverges when it is lowered alone"]))
    if wrong:
        warnings.warn(f"validation failed: {wrong[0]}", stacklevel=4)
    return Validated(build, [*build.rewritten.unmade, *_checks(compared)], reference_run)


def _checks(compared: Sequence[Compared]) -> list[Check]:
    return [check for c in compared for check in c.checks]


def _wrong(compared: Sequence[Compared]) -> list[Check]:
    return [c for c in _checks(compared) if not c.passed]


def _doubtful(compared: Sequence[Compared]) -> list[Check]:
    return [c for c in _checks(compared) if not c.passed or c.excused]


def _of_code(check: Check) -> bool:
    return check.name.startswith("compiled")


def _confirm(compared: Sequence[Compared], build: Build, session: Session) -> str:
    """Return what diverges when it is lowered alone, where a result is wrong or is excused by rounding; "" where nothing does.

    Where something does, rounding is no excuse: the checks of compiled code that it excused fail.
    """
    doubtful = _doubtful(compared)
    if not session.runs_here or not doubtful:
        return ""
    suspect = first_wrong_operator(build.rewritten.program, session.backend, session.target)
    for check in doubtful if suspect else ():
        if check.excused and _of_code(check):
            check.passed, check.detail = False, "rounding would explain it, but a part differs when it is lowered alone"
    return suspect and f"first operator that diverges: {suspect}"
