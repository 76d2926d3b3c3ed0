"""The search of approximate passes: candidates, an order, and as much of it as the budget allows.

A candidate replaces something in one place (a head, a layer) and has two numbers: ``error``, the squared relative change it makes there,
and ``saved``, the seconds it saves by the cost model. Then

1. *sensitivity*: of each group of candidates (one site) a representative choice is built and run once; the squared relative L2 error at
   the model's output over the sum of its errors at the site says what an error there costs. Small independent errors add up in squares.
2. *order*: of every key the candidates on the upper hull of (predicted error, saved) make steps of falling gain; all steps of all keys,
   by seconds saved per predicted error, are one path from "nothing" to "everything".
3. *how far*: bisection over the path, by the model's error on the search samples, in the budget's metric. An error is only compared with
   a limit, so a larger limit never stops earlier.
4. *held-out error*: on the samples that the search has not seen. Over the limit means the next smaller limit of a fixed ladder, from 3 on.

The whole is deterministic, and both 3 and 4 are monotone in the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thresher.approximation.budget import Measured, rel_l2
from thresher.approximation.calibration import Calibration
from thresher.ir.program import Program

LADDER_RATIO = 1.1  # between limits that are tried


@dataclass(frozen=True)
class Candidate:
    """A replacement. Of those with the same ``key`` at most one is chosen; those of one ``group`` act at the same site of the model."""

    key: Hashable
    group: str
    choice: str  # described for the report
    error: float
    saved: float
    node: str = ""
    module: str = ""
    payload: Any = None
    mass: Any = None  # for the report: tensors [queries, keys] of what was attended to
    mask: Any = None  # and of what is looked at


@dataclass
class Search:
    """A search among the candidates of one pass, on one program.

    ``name`` is that of the pass, for progress; ``build(program, chosen)`` makes the program with the chosen replacements; ``progress`` is
    called with a message before each measurement.
    """

    name: str
    build: Callable[[Program, Sequence[Candidate]], Program]
    program: Program
    calibration: Calibration
    progress: Callable[[str], None]
    _programs: dict[frozenset, Program] = field(default_factory=dict)
    _search_errors: dict[frozenset, Measured] = field(default_factory=dict)
    _held_out_errors: dict[frozenset, Measured] = field(default_factory=dict)

    def run(self, candidates: Sequence[Candidate], limit: float) -> list[Candidate]:
        """Return the candidates that are chosen: their error on the held-out samples is at most ``limit``."""
        sensitivity = {
            group: self.sensitivity(group, candidates) for group in dict.fromkeys(c.group for c in candidates)
        }
        path = order_candidates([replace(c, error=c.error * sensitivity[c.group]) for c in candidates])
        for allowed in ladder(limit):
            chosen = self.farthest(path, allowed)
            if not chosen or self.held_out_error(chosen).bound <= limit:
                return chosen
        return []

    def sensitivity(self, group: str, candidates: Sequence[Candidate]) -> float:
        """Return the squared relative error of the model's output, over the errors at the site that make it."""
        chosen = representatives([c for c in candidates if c.group == group])
        total = sum(c.error for c in chosen)
        if not total:
            return 0.0
        self.progress(f"{self.name}: how sensitive is the model to {group}")
        samples = self.calibration.search_samples[: max(2, len(self.calibration.search_samples) // 2)]
        changed = self.program_with(chosen)
        errors = [self.calibration.error(changed, flat, rel_l2) for flat in samples]
        return sum(e * e for e in errors) / len(errors) / total

    def farthest(self, path: Sequence[Candidate], limit: float) -> list[Candidate]:
        """Return as much of the path as stays within the limit on the search samples."""
        low, high = 0, len(path)
        while low < high:
            middle = (low + high + 1) // 2
            self.progress(f"{self.name}: measuring {middle} of {len(path)} steps")
            if self.search_error(last_of_each_key(path[:middle])).bound <= limit:
                low = middle
            else:
                high = middle - 1
        return last_of_each_key(path[:low])

    def program_with(self, chosen: Sequence[Candidate]) -> Program:
        """Return the program with the chosen replacements; the last one that was built is remembered."""
        name = frozenset((c.key, c.choice) for c in chosen)
        if name not in self._programs:
            self._programs = {name: self.build(self.program, chosen) if chosen else self.program}
        return self._programs[name]

    def search_error(self, chosen: Sequence[Candidate]) -> Measured:
        """Return the error of the chosen replacements on the search samples."""
        return self._measured(self._search_errors, chosen, self.calibration.search_samples)

    def held_out_error(self, chosen: Sequence[Candidate]) -> Measured:
        """Return the error of the chosen replacements on the held-out samples."""
        return self._measured(self._held_out_errors, chosen, self.calibration.held_out_samples)

    def _measured(self, known: dict[frozenset, Measured], chosen: Sequence[Candidate], samples: Sequence) -> Measured:
        name = frozenset((c.key, c.choice) for c in chosen)
        if name not in known:
            known[name] = self.calibration.measure(self.program_with(chosen), samples)
        return known[name]


def ladder(limit: float) -> list[float]:
    """Return the limits that are tried: the powers of LADDER_RATIO from ``limit`` down to a hundredth of it.

    The rungs are fixed, so that a larger budget tries all that a smaller one tries.
    """
    first = math.floor(math.log(limit, LADDER_RATIO) + 1e-9)
    return [LADDER_RATIO**i for i in range(first, first - math.ceil(math.log(100, LADDER_RATIO)), -1)]


def hull(candidates: Sequence[Candidate]) -> list[tuple[float, Candidate]]:
    """Return the candidates of one key that are worth their error, in order, each with its gain.

    They are the upper concave hull over (error, saved), from (0, 0) on; the gain is the seconds saved per error beyond the one before.
    """
    corners: list[Candidate] = []

    def gain(of: Candidate, beyond: Candidate | None) -> float:
        saved, error = of.saved - (beyond.saved if beyond else 0.0), of.error - (beyond.error if beyond else 0.0)
        return saved / error if error > 0 else math.inf

    for c in sorted(candidates, key=lambda c: (c.error, -c.saved, c.choice)):
        if c.saved <= (corners[-1].saved if corners else 0.0):
            continue
        while corners and gain(c, corners[-1]) >= gain(corners[-1], corners[-2] if len(corners) > 1 else None):
            corners.pop()
        corners.append(c)
    return [(gain(c, corners[i - 1] if i else None), c) for i, c in enumerate(corners)]


def order_candidates(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the path: the hulls of all keys by falling gain. A later candidate of a key replaces the earlier one."""
    steps = []
    for number, key in enumerate(dict.fromkeys(c.key for c in candidates)):
        for index, (gain, c) in enumerate(hull([c for c in candidates if c.key == key])):
            steps.append((-gain, number, index, c))
    return [c for *_, c in sorted(steps, key=lambda step: step[:3])]


def last_of_each_key(path: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidate that each key ends with after the steps of ``path``."""
    return list({c.key: c for c in path}.values())


def representatives(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the middle of every key's hull."""
    middles = []
    for key in dict.fromkeys(c.key for c in candidates):
        corners = [c for _, c in hull([c for c in candidates if c.key == key])]
        middles += corners[len(corners) // 2 :][:1]
    return middles
