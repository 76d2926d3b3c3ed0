"""The search for an operator that is lowered wrongly: parts of a program are lowered alone, on the values that they have in the whole one.

A part of a few calls hardly amplifies the rounding of its first one, so it can be judged where the whole program cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from thresher.backends.base import Backend
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.runtime.comparison import Check, check_outputs
from thresher.verification.rounding import find_undecided_choice, rounding_allowance
from thresher.verification.truth import SampledTruth

PART = 32  # calls that are lowered together at first: fewer parts are built sooner, larger ones round more


def first_wrong_operator(program: Program, backend: Backend, target: str) -> str:
    """Return a sentence that names the first operator of ``program`` whose lowering differs from torch, or an empty string.

    The program runs on its probe. A part of it differs where its error exceeds the tolerance of its dtype, and rounding in this part
    neither explains that (:mod:`thresher.verification.truth`) nor decides a choice. It is halved until a single operator is left. Where
    none of them differs alone, the sentence names the smallest part that does.
    """
    search = _Search(program, backend, target)
    program.run(*program.probe, watch=search.values.__setitem__)
    calls = [n for n in program.calls() if is_tensor(n)]
    faults = (search.fault(calls[i : i + PART]) for i in range(0, len(calls), PART))
    return next(filter(None, faults), "")


@dataclass(frozen=True)
class _Search:
    program: Program
    backend: Backend
    target: str
    values: dict[fx.Node, Any] = field(default_factory=dict)

    def fault(self, calls: Sequence[fx.Node]) -> str:
        """Return what is wrong with these calls, lowered together; empty where nothing is."""
        single, outputs = len(calls) == 1, [n for n in calls if _is_read_outside(n, set(calls))]
        alone = extract_subprogram(self.program, outputs, self.values, set(calls))
        try:
            check = self._check(alone, [self.values[n] for n in outputs])
        except Exception:  # alone it cannot be lowered, or its constants are no longer such; that is no wrong result
            return "" if single else self._halves(calls)
        wrong = not check.passed and find_undecided_choice(alone, alone.probe) is None
        if single:
            return _sentence(calls[0], check) if wrong else ""
        if check.passed and not check.excused:
            return ""
        together = f"{calls[0].name} to {calls[-1].name}, lowered together but not alone, error {check.error:.2e}"
        return self._halves(calls) or (together if wrong else "")

    def _check(self, alone: Program, expected: Sequence[Any]) -> Check:
        results = self.backend.lower(alone, self.target).run([v for v in alone.probe if isinstance(v, Tensor)])
        allowance = rounding_allowance(alone, alone.probe)
        return check_outputs(alone.name, expected, results, allowance, lambda: SampledTruth(alone, alone.probe))

    def _halves(self, calls: Sequence[fx.Node]) -> str:
        middle = len(calls) // 2
        return self.fault(calls[:middle]) or self.fault(calls[middle:])


def _sentence(node: fx.Node, check: Check) -> str:
    return (
        f"{node.name} ({node.target}, module {module_path(node)}), error {check.error:.2e} {source_line(node)}".rstrip()
    )


def _is_read_outside(node: fx.Node, calls: set[fx.Node]) -> bool:
    """Return whether another part reads ``node``; calls with several results belong to the part that reads them."""
    return any(
        user not in calls if is_tensor(user) or user.op == "output" else _is_read_outside(user, calls)
        for user in node.users
    )
