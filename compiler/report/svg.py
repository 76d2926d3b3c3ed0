"""Pictures for the report: what a head attended to and looks at now, and the wiring of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from thresher.report.graph_diff import Line

LEVELS = ("#e8eef4", "#a9c3dc", "#5b8fbf", "#1d5a96")  # of attention mass, from little to much
SIDE = 88  # pixels
ROW, LANE = 24, 12  # pixels: of a line of the graph, and between the rails beside it

Grid = Sequence[Sequence[float]]


def attention_picture(mass: Grid, mask: Grid) -> str:
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
        f"{paths}{cover}</svg>"
    )


def lanes(lines: Sequence[Line]) -> dict[str, int]:
    """The lane of every line, by name. A value keeps its lane until its last reader, which takes it over; so a chain is straight, and a
    branch is a lane of its own."""
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
    """An SVG to stand left of a list of lines ROW pixels high: a dot for each, and a rail from every value down to its readers."""
    lane = lanes(lines)
    row = {line.name: i for i, line in enumerate(lines)}
    paths = [_rail(lane[s], row[s], lane[line.name], i) for i, line in enumerate(lines) for s in line.inputs]
    dots = [
        f'<circle class="{line.mark}" cx="{_x(lane[line.name])}" cy="{_y(i)}" r="4"/>' for i, line in enumerate(lines)
    ]
    width, height = _x(max(lane.values(), default=0)) + LANE, ROW * len(lines)
    return (
        f'<svg class="rails" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<path d="{"".join(paths)}"/>{"".join(dots)}</svg>'
    )


def _rail(from_lane: int, from_row: int, to_lane: int, to_row: int) -> str:
    """Down the lane of the value, and within the last row over to the lane of the reader."""
    x, y = _x(from_lane), _y(to_row) - ROW
    start = f"M{x} {_y(from_row)}" + (f"V{y}" if y > _y(from_row) else "")
    if from_lane == to_lane:
        return f"{start}V{_y(to_row)}"
    return f"{start}C{x} {y + ROW * 2 // 3} {_x(to_lane)} {y + ROW // 3} {_x(to_lane)} {_y(to_row)}"


def _x(lane: int) -> int:
    return LANE + LANE * lane


def _y(row: int) -> int:
    return ROW * row + ROW // 2
