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
near miss    a graph one step off is refused, or rewritten rightly, too, also for a free number of samples
             (:mod:`thresher.testing.near_miss_graphs`)
budget       (approximate passes) the error of the result on samples that it did not see keeps within the budget
idle         (of a case) the pass rewrote nothing in any size: the case tests nothing
unmet        (of a case) with one value of a size the pass rewrote nothing, and the case does not say that this is meant
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Pass
from thresher.rewriting.registry import make_pass
from thresher.testing.cases import Case, Entry
from thresher.testing.judge import Finding, Judge
from thresher.testing.survey import Survey, Zoo, survey
from thresher.testing.trial import Trial

DTYPES = (torch.float64, torch.float16, torch.bfloat16)


class Findings(list[Finding]):
    """All findings about a pass, and the :class:`Survey` of the models that it was tried on (None without ``zoo``)."""

    survey: Survey | None = None


def prove(item: str | Pass, *cases: Case | Entry, **options: Any) -> Survey | None:
    """Examine a pass (:func:`examine` has the arguments); returns the survey of the models that it was tried on with ``zoo``.

    Raises :class:`AssertionError` with all findings, if there are any.
    """
    findings = examine(item, *cases, **options)
    if findings:
        raise AssertionError("\n".join(map(str, findings)))
    return findings.survey


def examine(
    item: str | Pass,
    *cases: Case | Entry,
    first: Sequence[str | Pass] = (),
    draws: int | None = None,
    misses: int = 120,
    dtypes: Sequence[torch.dtype] = DTYPES,
    context: Callable[[Program], Context] | None = None,
    seed: int = 0,
    every: bool = False,
    zoo: bool | Zoo = False,
) -> Findings:
    """Try a pass on cases and say what is wrong.

    Args:
        item: the pass, or ``name{option=value}``.
        cases: models; the pass is expected to rewrite each of them in at least one size. An entry has arguments of its own.
        first: passes, or names of pipelines, that run before it (and are not judged).
        draws: sizes of each case that are tried, at most; default: so many that any two values of its sizes occur together.
        misses: graphs one step off that are tried, per case.
        dtypes: of the models that are tried besides the one in float32.
        context: what the pass may look at, made for each program; approximate passes need a ``calibration`` in it.
        every: return all findings, not only the first of each check and case.
        zoo: try it on real models, too (:class:`~thresher.testing.survey.Zoo`); one that it leaves alone is no finding.

    Returns: one finding for each check and case that failed, the first one found.
    """
    findings = Findings()
    for trial in trials(
        item, *cases, first=first, draws=draws, misses=misses, dtypes=dtypes, context=context, seed=seed
    ):
        seen: dict[Any, Finding] = {}
        for step in trial.steps():
            for finding in step.run(trial.judge):
                seen.setdefault(finding if every else finding.check, finding)
        for finding in trial.unmet():
            seen.setdefault(finding if every else finding.check, finding)
        findings += seen.values()
    if zoo:
        judge = Judge(make_pass(item), context or (lambda program: Context()), seed)
        findings.survey = survey(judge, first, zoo if isinstance(zoo, Zoo) else Zoo())
        findings += findings.survey.findings
    return findings


def trials(
    item: str | Pass,
    *cases: Case | Entry,
    first: Sequence[str | Pass] = (),
    draws: int | None = None,
    misses: int = 120,
    dtypes: Sequence[torch.dtype] = DTYPES,
    context: Callable[[Program], Context] | None = None,
    seed: int = 0,
) -> list[Trial]:
    """Return the trials of a pass on cases; :func:`examine` has the arguments. What an :class:`Entry` says goes before them."""
    result = []
    for case in cases:
        entry = case if isinstance(case, Entry) else Entry(case)
        before, looks_at = entry.first or first, entry.context or context or (lambda program: Context())
        sizes, graphs = entry.draws or draws, misses if entry.misses is None else entry.misses
        result.append(
            Trial(entry.configured(item), entry.case, before, looks_at, sizes, graphs, dtypes, seed, entry.restored)
        )
    return result
