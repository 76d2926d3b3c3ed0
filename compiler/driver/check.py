"""Validation: the lowered code against the rewritten program and against the eager model, on the user's inputs and on random ones.

Where a result misses the bound of its dtype, the model in float64 judges (:mod:`thresher.verification.truth`). What that excuses in the
compiled code is looked at once more, in parts that are too short to amplify their rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from thresher.approximation.calibration import Calibration
from thresher.debugging.bisect import Search, find_wrong_operator
from thresher.driver.options import CompileOptions
from thresher.driver.session import Session
from thresher.driver.side_by_side import Compared, SideBySide
from thresher.driver.stages import Build, Captured, lower_again
from thresher.errors import ValidationError
from thresher.runtime.comparison import Check
from thresher.runtime.reference_run import ReferenceRun

DIFFERS = "its lowering differs from torch's result in this model"
OTHER_MODEL = (
    "the model computes something else where it is captured, before any pass: its code asks whether it is traced or exported "
    "(torch.compiler.is_exporting(), transformers' is_tracing()) and goes another way then; give it arguments or a configuration "
    "with which both ways are one, such as the mask that it would make itself"
)
MENDED = 3  # operators that torch computes because their lowering differs, at most


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
    model in float64 excuses what eager torch rounds in such a model, and not ten times that. Where an operator differs from torch's when
    it is lowered alone, and torch's own kernels may be called, they compute it; a warning names it, and so does ``report.library``.

    Raises:
        ValidationError: with the numbers and the operator that diverges, where ``options.validate`` is ``error``.
    """
    sides = SideBySide(build, captured, calibration, session)
    if options.validate == "off":
        return Validated(build, [], sides.reference_run(build.rewritten.program.probe, judged=False))
    with session.stage("validate", "validating"):
        compared = sides.compare()
        if session.runs_here and build.executable.rounds_more and any(map(_of_code, _doubtful(compared))):
            sides, compared = _again(sides, "strict rounding", strict_rounding=True)
        search = _confirm(compared, sides.build, session)
        mended: list[str] = []
        while search.suspect and len(mended) < MENDED and (instead := _by_torch(sides.build, search.suspect.node)):
            mended.append(search.suspect.text)
            sides, compared = _again(sides, "torch's kernel for what differs", library_nodes=instead)
            search = _confirm(compared, sides.build, session)
        reference_run = sides.reference_run(compared[0].flat)
    if (wrong := _wrong(compared)) and options.validate == "error":
        cause = OTHER_MODEL if sides.captured_otherwise(compared) else _sentence(search)
        raise ValidationError("\n".join([*map(str, wrong), cause]))
    if wrong:
        warnings.warn(f"validation failed: {wrong[0]}", stacklevel=4)
    elif mended:
        warnings.warn(
            f"torch computes what is lowered in another way than torch does: {'; '.join(mended)}", stacklevel=4
        )
    return Validated(sides.build, [*build.rewritten.unmade, *_checks(compared)], reference_run)


def _again(sides: SideBySide, why: str, **changes: Any) -> tuple[SideBySide, list[Compared]]:
    """Return the build made anew with other options of lowering, and its comparisons."""
    sides.session.progress(f"a result misses its bound: building with {why}")
    build = lower_again(sides.build, replace(sides.build.lowering_options, **changes), sides.session)
    sides = replace(sides, build=build)
    return sides, sides.compare()


def _by_torch(build: Build, node: fx.Node | None) -> dict[str, str]:
    """Return the nodes that torch is to compute, each with the reason, if those of the operator that differs can be added; else nothing."""
    known = build.lowering_options.library_nodes
    if node is None or not build.lowering_options.library or not isinstance(node.target, torch._ops.OpOverload):
        return {}
    names = {n.name for program in build.specialized.values() for n in program.calls(node.target)} - known.keys()
    return {**known, **dict.fromkeys(names, DIFFERS)} if names else {}


def _checks(compared: Sequence[Compared]) -> list[Check]:
    return [check for c in compared for check in c.checks]


def _wrong(compared: Sequence[Compared]) -> list[Check]:
    return [c for c in _checks(compared) if not c.passed]


def _doubtful(compared: Sequence[Compared]) -> list[Check]:
    return [c for c in _checks(compared) if not c.passed or c.excused]


def _of_code(check: Check) -> bool:
    return check.name.startswith("compiled")


def _confirm(compared: Sequence[Compared], build: Build, session: Session) -> Search:
    """Return what diverges when it is lowered alone, where a result is wrong or is excused by rounding.

    Where something does, rounding is no excuse: the checks of compiled code that it excused fail.
    """
    doubtful = _doubtful(compared)
    if not session.runs_here or not doubtful:
        return Search(None)
    options = replace(build.lowering_options, shared_weights=None)
    program, where = build.rewritten.program, _where_doubtful(compared, build)
    search = find_wrong_operator(program, session.backend, session.target, options, session.clock.now, where)
    for check in doubtful:
        if check.excused and _of_code(check):
            if search.suspect:
                check.passed = False
                check.detail = "rounding would explain it, but a part differs when it is lowered alone"
            elif search.unfinished:
                check.detail += f" ({search.unfinished})"
    return search


def _where_doubtful(compared: Sequence[Compared], build: Build) -> tuple[Any, ...]:
    """Return the first input of the example's shapes on which code is in doubt; else the example."""
    probe = build.rewritten.program.probe
    shapes = [getattr(x, "shape", None) for x in probe]
    doubtful = [c.flat for c in compared if any(map(_of_code, _doubtful([c])))]
    return next((flat for flat in doubtful if [getattr(x, "shape", None) for x in flat] == shapes), probe)


def _sentence(search: Search) -> str:
    if search.suspect is not None:
        return f"operator that diverges: {search.suspect.text}"
    return search.unfinished or "no part diverges when it is lowered alone"
