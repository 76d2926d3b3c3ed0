"""The ledger: what each approximate pass spent of the budget, and on what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thresher.approximation.budget import Measured

CELLS = 32  # along each side of a grid in the report, at most

Grid = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Change:
    """One thing that was replaced: where, by what, the squared relative error that it makes there, and the milliseconds that it is
    estimated to save. ``mass`` and ``mask``: of a head, what it attended to and what it looks at now, as coarse grids."""

    module: str
    choice: str
    error: float
    saved: float
    mass: list[list[float]] = field(default_factory=list)
    mask: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    """One approximate pass: the model's error before and after it, and the error on samples that chose nothing; ``checks`` of its own, in
    words."""

    name: str
    before: float
    after: float
    held_out: Measured
    changes: list[Change] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)


def coarse(grid: Grid) -> list[list[float]]:
    """A grid with at most CELLS x CELLS cells: means of neighbours."""
    rows, columns = len(grid), len(grid[0])
    tall, wide = -(-rows // CELLS), -(-columns // CELLS)
    return [
        [
            round(sum(sum(row[j : j + wide]) for row in grid[i : i + tall]) / (len(grid[i : i + tall]) * len(grid[0][j : j + wide])), 4)
            for j in range(0, columns, wide)
        ]
        for i in range(0, rows, tall)
    ]  # fmt: skip
