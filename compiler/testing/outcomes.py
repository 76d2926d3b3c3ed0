"""What one pass does to one model: both graphs in their text form, and what the pass says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass
from thresher.rewriting.manager import PassManager
from thresher.rewriting.registry import make_pass


@dataclass(frozen=True)
class Outcome:
    """The programs before and after one pass, the same one where nothing was changed, and what the pass said."""

    before: Program
    after: Program
    rewrites: list[Note] = field(default_factory=list)
    refusals: list[Note] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Return whether the pass gave another program back."""
        return self.after is not self.before

    @property
    def diff(self) -> str:
        """The lines of the text form that differ, as a unified diff."""
        return self.before.diff(self.after)

    def __str__(self) -> str:
        notes = [f"rewrote {n.node} ({n.module}): {n.message}" for n in self.rewrites]
        notes += [f"refused {n.node} ({n.module}): {n.message}" for n in self.refusals]
        return "\n".join([self.before.text(), self.after.text() if self.changed else "unchanged", *notes])


def before_after(
    item: str | Pass,
    model: nn.Module | Program,
    args: Sequence[Any] = (),
    first: Sequence[str | Pass] = (),
    context: Context | None = None,
) -> Outcome:
    """Apply one pass to a model (or a program), after the passes ``first``.

    Unlike in a build nothing is caught: what the pass raises is raised.
    """
    program = model if isinstance(model, Program) else capture(model.eval(), tuple(args))
    context = context or Context()
    program = PassManager(first, "each").run(program, context) if first else program
    result = make_pass(item).apply(program, context)
    return Outcome(program, result.program if result.rewrites else program, result.rewrites, result.refusals)


def refused(
    item: str | Pass,
    model: nn.Module | Program,
    args: Sequence[Any] = (),
    match: str = "",
    first: Sequence[str | Pass] = (),
    context: Context | None = None,
) -> Outcome:
    """Assert that a pass leaves a model alone; with ``match``, that one of its refusals says so (a regular expression)."""
    outcome = before_after(item, model, args, first, context)
    if outcome.changed:
        raise AssertionError(f"{make_pass(item)} should have refused, and rewrote:\n{outcome.diff}")
    messages = [n.message for n in outcome.refusals]
    if match and not any(re.search(match, message) for message in messages):
        raise AssertionError(f"{make_pass(item)} refused, but no refusal matches {match!r}: {messages}")
    return outcome
