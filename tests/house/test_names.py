"""A variable, a field or a parameter is named after the thing it holds: a noun of the field."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(p for top in ("compiler", "passes", "backends", "models") for p in (ROOT / top).rglob("*.py"))
#: Names that fit everything, and so do not tell a reader what is in them.
VAGUE = {"found", "made", "given", "told", "words", "said", "own", "place"}


def vague_names(path: Path) -> Iterator[str]:
    """Yield the line and the name of each variable, field and parameter of a file that has a vague name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
            yield f"line {node.lineno}: {node.id}"
        if isinstance(node, ast.arg) and node.arg in VAGUE:
            yield f"line {node.lineno}: {node.arg}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_name_is_vague(path: Path) -> None:
    assert list(vague_names(path)) == []
