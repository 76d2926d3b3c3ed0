"""Pictures for the report: the attention of a head before and after, and the wiring of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.report.graph_diff import Line

MASS_COLOURS = ("#e8eef4", "#a9c3dc", "#5b8fbf", "#1d5a96")  # from little attention to much
PICTURE_SIDE = 88  # pixels
ROW_HEIGHT, LANE_WIDTH = 24, 12  # pixels, of a line of the graph and of a rail beside it

Grid = Sequence[Sequence[float]]


def attention_picture(mass: Grid, mask: Grid) -> str:
    """Return an SVG of two grids [queries, keys]: attention mass in blue, under a pale cover where ``mask`` is 0.

    ``mask`` may be empty; the cover then is, too. Blue deepens with the square root of the mass, relative to the largest.
    """
    rows, columns = len(mass), len(mass[0])
    top = max((max(row) for row in mass), default=0.0) or 1.0
    levels: list[list[str]] = [[] for _ in MASS_COLOURS]
    masked = []
    for i, row in enumerate(mass):
        for j, value in enumerate(row):
            level = min(len(MASS_COLOURS) - 1, int((value / top) ** 0.5 * len(MASS_COLOURS)))
            levels[level].append(f"M{j} {i}h1v1h-1z")
            if mask and not mask[i][j]:
                masked.append(f"M{j} {i}h1v1h-1z")
    paths = "".join(
        f'<path fill="{colour}" d="{"".join(cells)}"/>' for colour, cells in zip(MASS_COLOURS, levels) if cells
    )
    cover = f'<path fill="#fff" fill-opacity=".82" d="{"".join(masked)}"/>' if masked else ""
    return (
        f'<svg width="{PICTURE_SIDE}" height="{PICTURE_SIDE}" viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img">'
        f"{paths}{cover}</svg>"
    )


def lanes(lines: Sequence[Line]) -> dict[str, int]:
    """Return the lane of every line, by name: a chain is straight, and a branch has a lane of its own.

    A value keeps its lane until its last reader, which takes it over.
    """
    last = {name: i for i, line in enumerate(lines) for name in line.inputs}
    lane: dict[str, int] = {}
    free: list[int] = []
    for i, line in enumerate(lines):
        free += [lane[s] for s in line.inputs if last[s] == i]
        free.sort()
        lane[line.name] = free.pop(0) if free else 1 + max(lane.values(), default=-1)
        if line.name not in last:  # an output, or read by none
            free.append(lane[line.name])
    return lane


def rails(lines: Sequence[Line]) -> str:
    """Return an SVG to stand left of ``lines``, each ROW_HEIGHT pixels high: a dot for each, a rail from every value to its readers."""
    lane = lanes(lines)
    row = {line.name: i for i, line in enumerate(lines)}
    paths = [_rail(lane[s], row[s], lane[line.name], i) for i, line in enumerate(lines) for s in line.inputs]
    dots = [
        f'<circle class="{line.mark}" cx="{_x(lane[line.name])}" cy="{_y(i)}" r="4"/>' for i, line in enumerate(lines)
    ]
    width, height = _x(max(lane.values(), default=0)) + LANE_WIDTH, ROW_HEIGHT * len(lines)
    return (
        f'<svg class="rails" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<path d="{"".join(paths)}"/>{"".join(dots)}</svg>'
    )


def _rail(from_lane: int, from_row: int, to_lane: int, to_row: int) -> str:
    """Return a path down the lane of the value, which crosses to the lane of the reader within the last row."""
    x, y = _x(from_lane), _y(to_row) - ROW_HEIGHT
    start = f"M{x} {_y(from_row)}" + (f"V{y}" if y > _y(from_row) else "")
    if from_lane == to_lane:
        return f"{start}V{_y(to_row)}"
    return f"{start}C{x} {y + ROW_HEIGHT * 2 // 3} {_x(to_lane)} {y + ROW_HEIGHT // 3} {_x(to_lane)} {_y(to_row)}"


def _x(lane: int) -> int:
    return LANE_WIDTH + LANE_WIDTH * lane


def _y(row: int) -> int:
    return ROW_HEIGHT * row + ROW_HEIGHT // 2
