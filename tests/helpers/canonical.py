"""Canonical form of a module, proven equal, and the records of the passes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe


def canonical(
    model: nn.Module, *inputs: Tensor, passes=pipelines.canonicalize
) -> tuple[Program, dict[str, PassRecord]]:
    """Return the program after ``passes``, proven equal in float64, and their records by name."""
    program = capture(model.eval(), inputs)
    manager = PassManager(passes, "each")
    result = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), result).exceeds(EXACT_TOLERANCE)
    return result, {r.name: r for r in manager.records}


def count(program: Program, target: Any) -> int:
    """Return how often an operator is called."""
    return len(list(program.calls(target)))
