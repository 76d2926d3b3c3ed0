"""The walls of the house: which room may import which, read from the imports themselves (docs/architecture.md draws them)."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]
PLACES = {
    "compiler": "thresher",
    "passes": "thresher.passes",
    "backends": "thresher.backends",
    "models": "thresher.models",
}
#: Imports that stand where none may. Each step of the move deletes some; the goal is none.
EXCEPTIONS = {
    ("thresher.analysis.attention.kinds", "thresher.analysis.attention.sites"),
    ("thresher.artifact.bundle", "thresher.artifact.writer"),
    ("thresher.backends.tvm.importing.importer", "thresher.backends.tvm.importing.converters"),
    ("thresher.report.html", "thresher.report.data"),
}
MOST_LOOSE = 5  # modules in compiler/ itself
#: (who, must not import, from whom).
WALLS = [
    ("thresher.passes", "thresher.backends"),
    ("thresher.backends", "thresher.passes"),
    ("thresher.analysis", "thresher.passes"),
    ("thresher.ops", "thresher.passes"),
]


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for place, package in PLACES.items():
        for path in (ROOT / place).rglob("*.py"):
            parts = path.relative_to(ROOT / place).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports() -> nx.DiGraph:
    """An edge from every module to every module of ours that it imports, wherever in its text."""
    files, graph = modules(), nx.DiGraph()
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [
                    f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in files else node.module for a in node.names
                ]
            else:
                continue
            graph.add_edges_from((name, other) for other in named if other in files and other != name)
    graph.remove_edges_from(EXCEPTIONS)
    return graph


def test_no_circle() -> None:
    assert [sorted(c) for c in nx.strongly_connected_components(imports()) if len(c) > 1] == []


@pytest.mark.parametrize(("who", "whom"), WALLS)
def test_walls(who: str, whom: str) -> None:
    through = [(a, b) for a, b in imports().edges if f"{a}.".startswith(f"{who}.") and f"{b}.".startswith(f"{whom}.")]
    assert through == []


def test_few_loose_modules() -> None:
    loose = [p.name for p in (ROOT / "compiler").glob("*.py") if p.name != "__init__.py"]
    assert len(loose) <= MOST_LOOSE, loose
