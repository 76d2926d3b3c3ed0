"""The search for an operator that is lowered wrongly: parts of a program are lowered alone, on the values that they have in the whole one.

A part of a few calls hardly amplifies the rounding of its first one, so it can be judged where the whole program cannot.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from thresher.backends.base import Backend, LoweringOptions
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.runtime.comparison import Check, check_outputs
from thresher.verification.rounding import find_undecided_choice, is_choice, rounding_allowance
from thresher.verification.truth import SampledTruth

PART = 32  # calls that are lowered together at first: fewer parts are built sooner, larger ones round more
SECONDS = (
    60.0  # that a search takes: in a graph of thousands of calls, most of those that are wrong are found in this time
)


@dataclass(frozen=True)
class Suspect:
    """A part of a program that differs from torch when it is lowered alone.

    Attributes:
        node: the call of a single operator; of a part of which no call differs alone, its first choice (top-k, sort), or None.
        text: a sentence that names it.
    """

    node: fx.Node | None
    text: str


@dataclass(frozen=True)
class Search:
    """The result of a search: a suspect or none, and, where it ended before all parts were looked at, a sentence that says so."""

    suspect: Suspect | None
    unfinished: str = ""


def find_wrong_operator(
    program: Program,
    backend: Backend,
    target: str,
    lowering_options: LoweringOptions,
    clock: Callable[[], float],
    flat: Sequence[Any] | None = None,
) -> Search:
    """Return an operator of ``program`` whose lowering differs from torch, if there is one.

    The program runs on the inputs ``flat``, of the example's shapes; default: on the example. A part of it differs where its error exceeds
    the tolerance of its dtype, and rounding in this part neither explains that (:mod:`thresher.verification.truth`) nor decides a choice.
    It is halved until a single operator is left. Where none of them differs alone, the smallest part that does is the suspect.

    A part is judged on the values that it has in torch, so the order is free: parts that choose (top-k, sort) come first, because they
    turn the least difference into another result. No part is begun after SECONDS of ``clock``.
    """
    search = _Search(program, backend, target, lowering_options)
    program.run(*(program.probe if flat is None else flat), watch=search.values.__setitem__)
    calls = [n for n in program.calls() if is_tensor(n)]
    parts = [calls[i : i + PART] for i in range(0, len(calls), PART)]
    parts.sort(key=lambda part: not any(map(is_choice, _with_sources(part))))
    end = clock() + SECONDS
    for number, part in enumerate(parts):
        if clock() > end:
            return Search(None, f"the search for it ended after {SECONDS:.0f} s, with {number} of {len(parts)} parts")
        if suspect := search.fault(part):
            return Search(suspect)
    return Search(None)


@dataclass(frozen=True)
class _Search:
    program: Program
    backend: Backend
    target: str
    lowering_options: LoweringOptions
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def fault(self, calls: Sequence[fx.Node]) -> Suspect | None:
        """Return what is wrong with these calls, lowered together; None where nothing is."""
        single, outputs = len(calls) == 1, [n for n in calls if _is_read_outside(n, set(calls))]
        alone = extract_subprogram(self.program, outputs, self.values, set(calls))
        try:
            check = self._check(alone, [self.values[n] for n in outputs])
        except Exception:  # alone it cannot be lowered, or its constants are no longer such; that is no wrong result
            return None if single else self._halves(calls)
        wrong = not check.passed and find_undecided_choice(alone, alone.probe) is None
        if single:
            return _suspect(calls[0], check) if wrong else None
        if check.passed and not check.excused:
            return None
        together = f"{calls[0].name} to {calls[-1].name}, lowered together but not alone, error {check.error:.2e}"
        if (half := self._halves(calls)) or not wrong:
            return half
        # among equal numbers that a constant makes (a mask): alone the choice may fall on any of them, here on none but torch's
        return Suspect(next(filter(is_choice, _with_sources(calls)), None), together)

    def _check(self, alone: Program, expected: Sequence[Any]) -> Check:
        executable = self.backend.lower(alone, self.target, self.lowering_options)
        results = executable.run([v for v in alone.probe if isinstance(v, Tensor)])
        allowance = rounding_allowance(alone, alone.probe)
        return check_outputs(alone.name, expected, results, allowance, lambda: SampledTruth(alone, alone.probe))

    def _halves(self, calls: Sequence[fx.Node]) -> Suspect | None:
        middle = len(calls) // 2
        return self.fault(calls[:middle]) or self.fault(calls[middle:])


def _with_sources(calls: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Yield the calls, and those of whose several results they are one."""
    for node in calls:
        yield node
        if node.target is operator.getitem:
            yield node.all_input_nodes[0]


def _suspect(node: fx.Node, check: Check) -> Suspect:
    call = node.all_input_nodes[0] if node.target is operator.getitem else node
    where = f"{call.name} ({call.target}, module {module_path(call)}), error {check.error:.2e} {source_line(call)}"
    return Suspect(call, where.rstrip())


def _is_read_outside(node: fx.Node, calls: set[fx.Node]) -> bool:
    """Return whether another part reads ``node``; calls with several results belong to the part that reads them."""
    return any(
        user not in calls if is_tensor(user) or user.op == "output" else _is_read_outside(user, calls)
        for user in node.users
    )
