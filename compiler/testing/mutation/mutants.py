"""Mutants of a pass: its source with one change, tried on the cases of the pass. One that nothing notices names what the cases miss.

A mutant is tried only where the pass runs the line that is changed: on those steps of the cases, the quickest first, up to the first
finding; then, if there are any, with the tests of the pass that run the line. Each has a process of its own, with a time limit.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from thresher.errors import ThresherError
from thresher.rewriting.contract import Pass
from thresher.testing.cases import Case, Entry
from thresher.testing.judge import Finding
from thresher.testing.mutation.forks import Lost, in_forks
from thresher.testing.mutation.pass_modules import Lines, execute, importers_of, modules_of, traced
from thresher.testing.mutation.source_edits import SourceEdit, source_edits
from thresher.testing.mutation.test_files import Test, first_failure, preload, record
from thresher.testing.proof import trials
from thresher.testing.trial import Example, Step, Trial

Outcome = Literal["killed", "timeout", "survived", "not reached"]
Reasons = Mapping[tuple[str, str, str], str]  # file, line before, line after: why the mutant is no other pass
SLACK, FACTOR = 20.0, 8.0  # seconds, and times what the pass itself takes, until a mutant counts as killed


@dataclass(frozen=True)
class Mutant:
    """A change of the source of a pass, and what became of it.

    Attributes:
        file: name of the file, after that of its folder.
        edit: the change.
        outcome: ``killed``, ``timeout`` (which counts as killed), ``survived``, or ``not reached``: no case and no test runs the line.
        check: the check of the proof kit that saw it, or the name of a test; empty where none did.
        reason: why it computes the same as the pass; empty where nobody said.
    """

    file: str
    edit: SourceEdit
    outcome: Outcome
    check: str = ""
    reason: str = ""

    @property
    def killed(self) -> bool:
        """Return whether something noticed the change."""
        return self.outcome in ("killed", "timeout")

    @property
    def lives(self) -> bool:
        """Return whether nothing noticed the change, and nobody said why."""
        return not self.killed and not self.reason

    @property
    def by_test(self) -> bool:
        """Return whether a test saw it, and the proof kit did not."""
        return "::" in self.check or self.check.endswith(".py")

    def __str__(self) -> str:
        outcome = f"{self.outcome} by {self.check}" if self.check else self.outcome
        return f"{self.file} {self.edit}: {outcome}{f', which is right: {self.reason}' if self.reason else ''}"


def mutate(
    item: str | Pass,
    *cases: Case | Entry,
    tests: Sequence[str] = (),
    only: Callable[[str, SourceEdit], bool] = lambda file, edit: True,
    limit: int | None = None,
    jobs: int = 1,
    reasons: Reasons | None = None,
    done: Callable[[Mutant], None] = lambda mutant: None,
    draws: int | None = 2,
    misses: int = 40,
    seed: int = 0,
    **options: Any,
) -> list[Mutant]:
    """Change the source of a pass in one place after the other, and return what became of each mutant, in the order of the lines.

    Args:
        item: the pass, or ``name{option=value}``.
        cases: as for :func:`thresher.testing.examine`, as are ``draws``, ``misses``, ``seed`` and the other ``options``.
        tests: test files that are run, by pytest, on the mutants that the cases do not kill.
        only: takes the file and the change, and returns whether the mutant is tried.
        limit: mutants that are tried, at most; these are drawn with the ``seed``.
        jobs: processes at a time.
        reasons: why mutants compute the same as the pass, by the file, the line before and the line after.
        done: is called with each mutant as soon as its outcome is known.

    Raises :class:`ThresherError` where the pass itself has findings or fails a test: then a finding says nothing of a mutant.
    """
    chosen = trials(item, *cases, draws=draws, misses=misses, seed=seed, **options)
    if not chosen:
        raise ThresherError("without a case every mutant survives: give at least one")
    modules = modules_of(type(chosen[0].item))
    sources = {module: Path(str(module.__file__)).read_text() for module in modules}
    edits = [(m, edit) for m, text in sources.items() for edit in source_edits(text, vars(m)) if only(_name(m), edit)]
    if limit is not None and limit < len(edits):
        drawn = sorted(random.Random(seed).sample(range(len(edits)), limit))
        edits = [edits[index] for index in drawn]
    proven = _Proven(chosen, [str(module.__file__) for module in modules], [])
    proven.run()
    if tests:
        proven.tests += _recorded(tests, proven.files)
    importers = {module: importers_of(module) for module in modules}
    calls = [_Attempt(proven, module, edit, edit.applied(sources[module]), importers[module]) for module, edit in edits]
    mutants: dict[int, Mutant] = {}
    for index, answer in in_forks([call.verdict for call in calls], jobs, lambda index: calls[index].seconds):
        module, edit = edits[index]
        reason = (reasons or {}).get((_name(module), edit.old_line, edit.new_line), "")
        mutants[index] = Mutant(_name(module), edit, *_outcome(answer), reason)
        done(mutants[index])
    return [mutants[index] for index in range(len(edits))]


def _outcome(answer: Lost | tuple[Outcome, str]) -> tuple[Outcome, str]:
    if not isinstance(answer, Lost):
        return answer
    return ("timeout", "") if answer.timeout else ("killed", "end of the process")


def _name(module: ModuleType) -> str:
    path = Path(str(module.__file__))
    return f"{path.parent.name}/{path.name}"


def _recorded(tests: Sequence[str], files: Sequence[str]) -> list[Test]:
    """Return the tests of some files. They run in a process of their own, so that nothing they leave reaches the mutants."""
    preload(tests)

    ((_, answer),) = in_forks([lambda: record(tests, files)], 1, lambda index: 3600.0)
    if isinstance(answer, Lost):
        raise ThresherError(f"pytest ended without a result: {', '.join(tests)}")
    return answer


@dataclass(frozen=True)
class _Ran:
    """A step of a trial, the lines of the pass that it reaches, and its seconds."""

    trial: Trial
    step: Step
    lines: Lines
    seconds: float


@dataclass
class _Proven:
    """A pass that went through its trials, and what each step reached."""

    trials: list[Trial]
    files: list[str]
    tests: list[Test]
    steps: list[_Ran] = field(default_factory=list)

    def run(self) -> None:
        for trial in self.trials:
            findings: list[Finding] = []
            for step in trial.steps():
                start = time.perf_counter()
                with traced(self.files) as lines:
                    findings += step.run(trial.judge)
                self.steps.append(_Ran(trial, step, lines, time.perf_counter() - start))
            findings += trial.unmet()
            if findings:
                raise ThresherError(f"{trial.item} has findings before anything is changed: {findings[0]}")


@dataclass
class _Attempt:
    """One mutant: what is tried on it, in which order."""

    proven: _Proven
    module: ModuleType
    edit: SourceEdit
    text: str
    importers: Sequence[ModuleType]

    def __post_init__(self) -> None:
        self.steps = sorted(
            (ran for ran in self.proven.steps if self._reached(ran.lines)),
            key=lambda ran: (not isinstance(ran.step, Example), ran.seconds),
        )
        self.tests = sorted((t for t in self.proven.tests if self._reached(t.lines)), key=lambda t: t.seconds)

    @property
    def seconds(self) -> float:
        """Return the time limit."""
        return SLACK + FACTOR * (sum(ran.seconds for ran in self.steps) + sum(test.seconds for test in self.tests))

    def _reached(self, lines: Lines) -> bool:
        """Return whether lines that ran have the change; what runs when the module is imported is everywhere."""
        file = str(self.module.__file__)
        return not self.edit.reached or any((file, number) in lines for number in self.edit.reached)

    def verdict(self) -> tuple[Outcome, str]:
        """Try the mutant; in a fork, since there is no way back."""
        if not self.steps and not self.tests:
            return "not reached", ""
        try:
            execute(self.module, self.text, self.importers)
        except Exception:
            return "killed", "import"
        try:
            check = next(self._checks(), "")
        except Exception:  # even the kit cannot deal with it
            check = "raises"
        if check:
            return "killed", check
        if self.tests and (name := first_failure([test.name for test in self.tests])):
            return "killed", name
        return "survived", ""

    def _checks(self) -> Iterator[str]:
        """Yield the checks of the proof kit that fail."""
        for trial in dict.fromkeys(map(id, (ran.trial for ran in self.steps))):
            yield from self._of_trial([ran for ran in self.steps if id(ran.trial) == trial])

    def _of_trial(self, steps: Sequence[_Ran]) -> Iterator[str]:
        trial = steps[0].trial
        try:
            judge = dataclasses.replace(trial.judge, item=_anew(trial.item))
        except Exception:
            yield "raises"
            return
        examples = [ran for ran in steps if isinstance(ran.step, Example)]
        for ran in examples:
            yield from (finding.check for finding in ran.step.run(judge))
        yield from (finding.check for finding in trial.unmet())
        for ran in steps[len(examples) :]:
            yield from (finding.check for finding in ran.step.run(judge))


def _anew(item: Pass) -> Pass:
    """Return the pass as an instance of the class that its module has now."""
    cls = getattr(sys.modules[type(item).__module__], type(item).__qualname__)
    return cls(**{f.name: getattr(item, f.name) for f in dataclasses.fields(item)})
