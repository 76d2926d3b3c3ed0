"""The rooms of the house: every module, what it imports, and the room that it stands in.

A room is a folder of ``compiler/``, or one of ``passes/``, ``backends/`` and ``models/``. Two rooms are made of the modules that lie in
``compiler/`` itself: ``thresher`` has the public names, ``basics`` has what every room may import. ``docs/generate.py`` draws the rooms;
``tests/house`` keeps their walls.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "compiler": "thresher",
    "passes": "thresher.passes",
    "backends": "thresher.backends",
    "models": "thresher.models",
}
PUBLIC = ("thresher", "thresher.authoring")


def modules() -> dict[str, Path]:
    """Return the file of every module by its dotted name."""
    files = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *parts]).removesuffix(".__init__")] = path
    return files


@functools.cache
def imports() -> nx.DiGraph:
    """Return a graph with an edge from every module to each module of this project that its text imports, in functions too."""
    files, graph = modules(), nx.DiGraph()
    graph.add_nodes_from(files)
    for name, path in files.items():
        graph.add_edges_from((name, other) for other in _imported(path, files) if other != name)
    return graph


def _imported(path: Path, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                yield member if member in files else node.module


def room(module: str) -> str:
    """Return the room of a module."""
    if module in PUBLIC:
        return "thresher"
    folder = module.split(".")[1]
    return "basics" if (ROOT / "compiler" / f"{folder}.py").exists() else folder


def rooms() -> nx.DiGraph:
    """Return a graph with an edge from every room to each room that one of its modules imports."""
    graph = nx.DiGraph()
    graph.add_nodes_from(map(room, modules()))
    graph.add_edges_from((room(a), room(b)) for a, b in imports().edges if room(a) != room(b))
    return graph
