"""Small pictures for the report: what a head attended to, and what it looks at now."""

from __future__ import annotations

from collections.abc import Sequence

LEVELS = ("#e8eef4", "#a9c3dc", "#5b8fbf", "#1d5a96")  # of attention mass, from little to much
CELLS = 32  # along each side at most
SIDE = 88  # pixels

Grid = Sequence[Sequence[float]]


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


def attention_picture(mass: Grid, mask: Grid, title: str) -> str:
    """An SVG: attention mass in blue (queries downward, keys to the right), and in grey over it what is not looked at any more."""
    rows, columns = len(mass), len(mass[0])
    top = max((max(row) for row in mass), default=0.0) or 1.0
    levels: list[list[str]] = [[] for _ in LEVELS]
    gone = []
    for i, row in enumerate(mass):
        for j, value in enumerate(row):
            levels[min(len(LEVELS) - 1, int((value / top) ** 0.5 * len(LEVELS)))].append(f"M{j} {i}h1v1h-1z")
            if mask and not mask[i][j]:
                gone.append(f"M{j} {i}h1v1h-1z")
    paths = "".join(f'<path fill="{colour}" d="{"".join(cells)}"/>' for colour, cells in zip(LEVELS, levels) if cells)
    cover = f'<path fill="#fff" fill-opacity=".82" d="{"".join(gone)}"/>' if gone else ""
    return (
        f'<svg width="{SIDE}" height="{SIDE}" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img">'
        f"<title>{title}</title>{paths}{cover}</svg>"
    )
