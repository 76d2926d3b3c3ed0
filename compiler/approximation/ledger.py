"""The ledger: what each approximate pass spent of the budget, and for which changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thresher.approximation.budget import Measured

MAX_CELLS = 32  # along each side of a grid in the report, at most

Grid = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Change:
    """A replacement that was made.

    ``module``: where; ``choice``: by what; ``error``: the squared relative error that it makes there; ``saved``: its estimated saving in
    milliseconds. ``mass`` and ``mask``: of a head, what it attended to and what it looks at now, as coarse grids.
    """

    module: str
    choice: str
    error: float
    saved: float
    mass: list[list[float]] = field(default_factory=list)
    mask: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Spent:
    """The entry of one approximate pass.

    ``before`` and ``after``: the model's error before and after it, in the budget's metric, on the held-out samples; ``held_out``: the same
    with its confidence interval; ``checks``: sentences of the pass for the report.
    """

    name: str
    before: float
    after: float
    held_out: Measured
    changes: list[Change] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)


def coarse(grid: Grid) -> list[list[float]]:
    """Return a grid with at most MAX_CELLS x MAX_CELLS cells: means of neighbours, rounded to four digits."""

    def mean(i: int, j: int) -> float:
        block = [row[j : j + width] for row in grid[i : i + height]]
        return sum(map(sum, block)) / (len(block) * len(block[0]))

    rows, columns = len(grid), len(grid[0])
    height, width = -(-rows // MAX_CELLS), -(-columns // MAX_CELLS)
    return [[round(mean(i, j), 4) for j in range(0, columns, width)] for i in range(0, rows, height)]
