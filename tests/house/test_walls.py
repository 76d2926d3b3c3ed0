"""The walls of the house: which room may import which, read from the imports themselves (docs/architecture.md draws them)."""

from __future__ import annotations

import ast

import networkx as nx
import pytest
from rooms import ROOT, imports, modules

MAX_LOOSE = 5  # modules in compiler/ itself
#: What analyses and what they stand on: these import nothing from rewriting upward.
LOWER = ("ir", "ops", "analysis", "approximation", "verification", "tuning")
UPPER = (
    *("rewriting", "frontend", "exporters", "report", "artifact", "debugging", "driver", "cli", "testing"),
    *("passes", "backends"),
)
#: (who, must not import, from whom).
WALLS = [
    ("thresher.passes", "thresher.backends"),
    ("thresher.backends", "thresher.passes"),
    *((f"thresher.{lower}", f"thresher.{upper}") for lower in LOWER for upper in UPPER),
    *(("thresher.report", f"thresher.{other}") for other in ("driver", "passes", "backends")),
]
#: Only what is under these knows both the passes and the backends.
ABOVE_BOTH = ("thresher.driver", "thresher.debugging")


def is_under(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_no_circle() -> None:
    assert [sorted(c) for c in nx.strongly_connected_components(imports()) if len(c) > 1] == []


@pytest.mark.parametrize(("who", "whom"), WALLS)
def test_walls(who: str, whom: str) -> None:
    through = [(a, b) for a, b in imports().edges if is_under(a, who) and is_under(b, whom)]
    assert through == []


def test_the_runtime_needs_neither_torch_nor_the_compiler() -> None:
    """Also not inside a function, where an import would fail only when it runs."""
    for name, path in modules().items():
        if f"{name}.".startswith("thresher.runtime."):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            imported = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
            imported |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
            assert not {i.split(".")[0] for i in imported} & {"torch", "tvm"}, name
            ours = {".".join(i.split(".")[:2]) for i in imported if i.split(".")[0] == "thresher"}
            assert ours <= {"thresher.runtime", "thresher.errors"}, name


def test_only_driver_and_debugging_know_both_sides() -> None:
    graph = imports()
    know_both = [
        name
        for name in graph
        if all(any(is_under(m, side) for m in graph[name]) for side in ("thresher.passes", "thresher.backends"))
    ]
    assert [name for name in know_both if not any(is_under(name, top) for top in ABOVE_BOTH)] == []


def test_few_loose_modules() -> None:
    loose = [p.name for p in (ROOT / "compiler").glob("*.py") if p.name != "__init__.py"]
    assert len(loose) <= MAX_LOOSE, loose
