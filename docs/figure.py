"""A drawing of a graph without circles, in floors: every node stands above all that it points to.

The method is Sugiyama's (1981): floors by the longest path, a bend on every floor that an arrow passes, few crossings by sorting each floor
by the mean of its neighbours, and positions that keep arrows straight. Everything is decided by the graph alone: the same graph gives the
same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations, pairwise

import networkx as nx

Bend = tuple[str, str, int]  # of the arrow from .. to .., on a floor
Spot = str | Bend

BOX, HEIGHT, FLOOR = 172, 46, 98  # width and height of a box, and from one floor to the next; pixels
GAP, LANE, MARGIN = 26, 22, 36  # between boxes, between the bends of arrows, and around everything
KEY = 140  # width of an entry of the key
STARTS, ORDERINGS = 24, 8  # random orders to begin with, and sweeps over the floors for each
SWEEPS = 300  # over the positions


STYLE = """
text{font-family:Helvetica,Arial,sans-serif;text-anchor:middle;fill:#1f2933}
.paper{fill:#ffffff}
.arrow{fill:none;stroke:#8796a5;stroke-width:1.3}
.head{fill:#8796a5}
.name{font-size:15px;font-weight:bold}
.caption{font-size:11.5px;fill:#4a5866}
.key{font-size:12.5px;text-anchor:start}
.step{fill:#c2410c}
.number{font-size:12.5px;font-weight:bold;fill:#ffffff}
"""
#: Fill and border of the boxes of each group, in order.
COLOURS = (("#ede7f6", "#8e75b8"), ("#fdecd8", "#d08b3e"), ("#e3f3e6", "#5fa46c"), ("#e1eef9", "#5b93c4"))


@dataclass(frozen=True)
class Label:
    """The text of a box: a caption below its name, the group that gives its colour, and its step on the way of a model ("": none)."""

    caption: str
    group: str
    step: str = ""


def draw(graph: nx.DiGraph, labels: Mapping[str, Label]) -> str:
    """Return an SVG file of ``graph``, with a label for each node; arrows that follow from others are left out.

    Raises:
        networkx.NetworkXError: the graph has a circle.
    """
    arrows = nx.DiGraph(sorted(nx.transitive_reduction(graph).edges))
    arrows.add_nodes_from(sorted(graph))
    floors = _ordered(_floors(arrows), arrows)
    x = _positions(floors, arrows)
    top = len(floors) - 1
    y = {spot: MARGIN + FLOOR * (top - number) for number, floor in enumerate(floors) for spot in floor}
    width = max(x[s] for s in labels) + BOX / 2 + MARGIN
    height = 3 * MARGIN + FLOOR * top + HEIGHT
    ends, groups = _ends(arrows, x), list(dict.fromkeys(label.group for label in labels.values()))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
            f"<style>{STYLE}{_colours()}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0.5L8 4L0 7.5z" class="head"/></marker></defs>',
            f'<rect width="{width:.0f}" height="{height:.0f}" class="paper"/>',
            *(_arrow(*arrow, x, y, *ends[arrow]) for arrow in sorted(arrows.edges)),
            *(line for n in sorted(labels) for line in _box(n, labels[n], groups.index(labels[n].group), x[n], y[n])),
            *_key(groups, width, height - MARGIN - 8),
            "</svg>\n",
        ]
    )


def _floors(arrows: nx.DiGraph) -> dict[str, int]:
    """Return the floor of every node: 0 for what points to nothing, else one above the highest that it points to."""
    floors: dict[str, int] = {}
    for node in reversed(list(nx.lexicographical_topological_sort(arrows))):
        floors[node] = max((floors[other] + 1 for other in arrows.successors(node)), default=0)
    return floors


def _path(a: str, b: str, floor: Mapping[str, int]) -> list[Spot]:
    """Return the spots of an arrow from its upper end to its lower one."""
    return [a, *((a, b, level) for level in range(floor[a] - 1, floor[b], -1)), b]


# ---------------------------------------------------------------------- order on each floor


def _ordered(floor: Mapping[str, int], arrows: nx.DiGraph) -> list[list[Spot]]:
    """Return the spots of every floor from left to right, the lowest floor first: the best of several searches for few crossings."""
    links = nx.Graph(link for a, b in sorted(arrows.edges) for link in pairwise(_path(a, b, floor)))
    candidates = []
    for seed in range(STARTS):
        floors: list[list[Spot]] = [[] for _ in range(max(floor.values()) + 1)]
        for spot in sorted(links.nodes, key=str):
            floors[_level(spot, floor)].append(spot)
        for spots in floors:
            random.Random(seed).shuffle(spots)
        candidates += _searched(floors, links)
    return min(candidates, key=lambda floors: (_crossings(floors, links), _spread(floors, links)))


def _searched(floors: list[list[Spot]], links: nx.Graph) -> Iterator[list[list[Spot]]]:
    """Sort each floor by the one beside it, upward and downward in turn, and yield the floors after each sweep."""
    for sweep in range(ORDERINGS):
        order = list(range(len(floors)))[:: 1 if sweep % 2 else -1]
        for level, beside in pairwise(order):
            index = {spot: i for i, spot in enumerate(floors[level])}
            floors[beside] = _sorted(floors[beside], links, index)
        for level in order:
            _swap(floors, level, links)
        yield [list(spots) for spots in floors]


def _level(spot: Spot, floor: Mapping[str, int]) -> int:
    return floor[spot] if isinstance(spot, str) else spot[2]


def _sorted(spots: Sequence[Spot], links: nx.Graph, index: Mapping[Spot, int]) -> list[Spot]:
    """Return the spots of a floor by the mean index of their neighbours on another one; without any, they keep their index."""

    def mean(item: tuple[int, Spot]) -> float:
        near = [index[other] for other in links[item[1]] if other in index]
        return sum(near) / len(near) if near else item[0]

    return [spot for _, spot in sorted(enumerate(spots), key=mean)]


def _swap(floors: list[list[Spot]], level: int, links: nx.Graph) -> None:
    """Exchange neighbours on a floor as long as that saves crossings."""
    beside = [
        {spot: i for i, spot in enumerate(floors[other])}
        for other in (level - 1, level + 1)
        if 0 <= other < len(floors)
    ]

    def crossed(left: Spot, right: Spot) -> int:
        return sum(
            index[a] > index[b]
            for index in beside
            for a in links[left]
            for b in links[right]
            if a in index and b in index
        )

    spots, changed = floors[level], True
    while changed:
        changed = False
        for i in range(len(spots) - 1):
            left, right = spots[i], spots[i + 1]
            if crossed(left, right) > crossed(right, left):
                spots[i], spots[i + 1], changed = right, left, True


def _crossings(floors: Sequence[Sequence[Spot]], links: nx.Graph) -> int:
    total = 0
    for lower, upper in pairwise(floors):
        below, above = ({spot: i for i, spot in enumerate(f)} for f in (lower, upper))
        ends = [(above[a], below[b]) for a in upper for b in links[a] if b in below]
        total += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(ends, 2))
    return total


def _spread(floors: Sequence[Sequence[Spot]], links: nx.Graph) -> float:
    """Return how far the ends of all links are apart sideways, as fractions of their floors."""
    place = {spot: (i + 0.5) / len(spots) for spots in floors for i, spot in enumerate(spots)}
    return sum(abs(place[a] - place[b]) for a, b in links.edges)


# ---------------------------------------------------------------------- positions


def _positions(floors: Sequence[Sequence[Spot]], arrows: nx.DiGraph) -> dict[Spot, float]:
    """Return the x of the middle of every spot: each where its neighbours are, as far as the distances allow."""
    floor = {spot: level for level, spots in enumerate(floors) for spot in spots if isinstance(spot, str)}
    near: dict[Spot, dict[Spot, int]] = {spot: {} for spots in floors for spot in spots}
    for a, b in arrows.edges:
        for one, other in pairwise(_path(a, b, floor)):
            weight = (1, 4, 32)[(not isinstance(one, str)) + (not isinstance(other, str))]  # long arrows are straight
            near[one][other] = near[other][one] = weight
    x = {spot: i * (BOX + GAP) for spots in floors for i, spot in enumerate(spots)}
    for _ in range(SWEEPS):
        for spots in (*floors, *reversed(floors)):
            ideal = [sum(w * x[o] for o, w in near[s].items()) / sum(near[s].values()) for s in spots]
            x.update(zip(spots, _apart(ideal, spots, [sum(near[s].values()) for s in spots])))
    left = min(x[s] for s in floor) - BOX / 2 - MARGIN
    return {spot: round(value - left, 1) for spot, value in x.items()}


def _apart(ideal: Sequence[float], spots: Sequence[Spot], weights: Sequence[float]) -> list[float]:
    """Return the positions nearest to ``ideal`` (weighted squares) that keep the order and the distances: isotonic regression."""
    offsets = [0.0]
    for a, b in pairwise(spots):
        half = [BOX / 2 if isinstance(s, str) else LANE / 2 for s in (a, b)]
        offsets.append(offsets[-1] + sum(half) + (GAP if all(isinstance(s, str) for s in (a, b)) else LANE / 2))
    blocks: list[list[float]] = []  # [mean, weight, count]: blocks of spots that touch
    for value, offset, weight in zip(ideal, offsets, weights):
        blocks.append([value - offset, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (m, w, n), (m2, w2, n2) = blocks[-2:]
            blocks[-2:] = [[(m * w + m2 * w2) / (w + w2), w + w2, n + n2]]
    means = [mean for mean, _, count in blocks for _ in range(int(count))]
    return [mean + offset for mean, offset in zip(means, offsets)]


# ---------------------------------------------------------------------- lines


def _ends(arrows: nx.DiGraph, x: Mapping[Spot, float]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the x of both ends of every arrow: those of a box are spread over its side, in the order in which they leave it."""
    floor = _floors(arrows)
    paths = {(a, b): _path(a, b, floor) for a, b in arrows.edges}

    def spread(box: str, edges: Sequence[tuple[str, str]], neighbour: int) -> dict[tuple[str, str], float]:
        edges = sorted(edges, key=lambda edge: (x[paths[edge][neighbour]], edge))
        step = min(LANE, (BOX - LANE) / max(len(edges) - 1, 1))
        return {edge: x[box] + step * (i - (len(edges) - 1) / 2) for i, edge in enumerate(edges)}

    starts = {edge: value for box in arrows for edge, value in spread(box, list(arrows.out_edges(box)), 1).items()}
    stops = {edge: value for box in arrows for edge, value in spread(box, list(arrows.in_edges(box)), -2).items()}
    return {edge: (starts[edge], stops[edge]) for edge in paths}


def _arrow(a: str, b: str, x: Mapping[Spot, float], y: Mapping[Spot, float], start: float, stop: float) -> str:
    bends = sorted((s for s in x if isinstance(s, tuple) and s[:2] == (a, b)), key=lambda s: y[s])
    points = [(start, y[a] + HEIGHT), *((x[s], y[s] + dy) for s in bends for dy in (0, HEIGHT)), (stop, y[b] - 1)]
    line = f"M{start:.1f} {points[0][1]:.0f}"
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        half = (y1 - y0) / 2
        line += f"V{y1:.0f}" if i % 2 else f"C{x0:.1f} {y0 + half:.0f} {x1:.1f} {y1 - half:.0f} {x1:.1f} {y1:.0f}"
    return f'<path class="arrow" d="{line}" marker-end="url(#head)"/>'


def _colours() -> str:
    return "".join(f".group{i}{{fill:{fill};stroke:{border}}}\n" for i, (fill, border) in enumerate(COLOURS))


def _key(groups: Sequence[str], width: float, y: float) -> Iterator[str]:
    """Yield the key of the colours and of the numbers: one line in the middle of the page."""
    x = (width - KEY * (len(groups) + 1)) / 2
    for i, group in enumerate(groups):
        yield f'<rect class="group{i}" x="{x + KEY * i:.0f}" y="{y:.0f}" width="22" height="15" rx="3"/>'
        yield f'<text class="key" x="{x + KEY * i + 30:.0f}" y="{y + 12:.0f}">{escape(group)}</text>'
    x += KEY * len(groups)
    yield f'<circle class="step" cx="{x + 12:.0f}" cy="{y + 8:.0f}" r="9"/>'
    yield f'<text class="key" x="{x + 30:.0f}" y="{y + 12:.0f}">step of the walk</text>'


def _box(name: str, label: Label, group: int, x: float, y: float) -> Iterator[str]:
    yield f'<rect class="group{group}" x="{x - BOX / 2:.1f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="7"/>'
    yield f'<text class="name" x="{x:.1f}" y="{y + 20:.0f}">{escape(name)}</text>'
    yield f'<text class="caption" x="{x:.1f}" y="{y + 36:.0f}">{escape(label.caption)}</text>'
    if label.step:
        yield f'<circle class="step" cx="{x - BOX / 2:.1f}" cy="{y:.0f}" r="11"/>'
        yield f'<text class="number" x="{x - BOX / 2:.1f}" y="{y + 4:.0f}">{label.step}</text>'
