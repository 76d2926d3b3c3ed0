"""The base of approximate passes: they share the search for what the budget allows (:mod:`thresher.approximation.search`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from thresher.analysis.cost.cost import MachineModel, seconds
from thresher.approximation.calibration import Calibration
from thresher.approximation.ledger import Change, Spent, coarse
from thresher.approximation.search import Candidate, Search
from thresher.errors import PassError
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Kind, Note, Pass, PassResult


@dataclass(frozen=True)
class ApproximatePass(Pass):
    """Base of the approximate passes: a subclass lists what could be replaced (:meth:`candidates`) and replaces it (:meth:`edit`)."""

    kind: ClassVar[Kind] = "approximate"

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        """Return what could be replaced, and refusals for what could not. Must not change ``program``."""
        raise NotImplementedError

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        """Return ``program`` with the chosen replacements, at most one per key. ``program`` itself stays as it is."""
        work = program.clone()
        for candidate in chosen:
            self.edit(work, candidate)
        return work.clean()

    def edit(self, program: Program, candidate: Candidate) -> None:
        """Write one replacement into ``program``; not needed by a pass that overrides :meth:`build`."""
        raise NotImplementedError

    def with_savings(self, program: Program, candidates: Sequence[Candidate], machine: MachineModel) -> list[Candidate]:
        """Return the candidates with the seconds that each alone saves by the cost model."""
        before = seconds(program, machine)
        return [dataclasses.replace(c, saved=before - seconds(self.build(program, [c]), machine)) for c in candidates]

    def checks(self, result: Program, calibration: Calibration) -> list[str]:
        """Return sentences for the report: facts of the result beside its error, that a user should know."""
        return []

    def apply(self, program: Program, context: Context) -> PassResult:
        calibration = context.calibration
        if calibration is None:
            raise PassError(
                f"pass {self.name!r} is approximate: give calibration= (samples) and budget= (how much error is allowed)"
            )
        limit = calibration.budget.limit * context.budget_fraction
        if limit == 0:
            return PassResult(program, [], [Note("", "", "the budget is 0: nothing is approximated")])
        candidates, refusals = self.candidates(program, context)
        search = Search(self.name, self.build, program, calibration, context.progress)
        chosen = search.run(candidates, limit)
        if not chosen:
            return PassResult(program, [], refusals)
        result = search.program_with(chosen)
        before = calibration.measure(program, calibration.held_out_samples).mean
        held_out = search.held_out_error(chosen)
        changes = [_change(c) for c in chosen]
        checks = self.checks(result, calibration)
        spent = Spent(self.name, before, held_out.mean, held_out, changes, checks)
        return PassResult(result, [Note(c.node, c.module, c.choice) for c in chosen], refusals, spent=spent)


def _change(c: Candidate) -> Change:
    mass, mask = ([] if t is None else coarse(t.float().tolist()) for t in (c.mass, c.mask))
    return Change(c.module, c.choice, c.error, 1e3 * c.saved, mass, mask)
