"""Every public definition says what it does, in a sentence with a verb; a method may leave that to the method it overrides."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOP = ("compiler", "passes", "backends", "models")
#: Words that a docstring does not begin with: it names what a definition does, not what it is about.
NOUNS = ("What ", "Whether ", "Of ", "How ", "Where ", "Which ", "Why ")
MOST_LINES = 400
Definition = ast.FunctionDef | ast.ClassDef

FILES = sorted(p for top in TOP for p in (ROOT / top).rglob("*.py"))


def definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition, bool]]:
    """Yield the public functions, classes and methods: dotted name, definition, and whether a base class may have its docstring."""
    inherits = isinstance(tree, ast.ClassDef) and bool(tree.bases)
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node, inherits and isinstance(node, ast.FunctionDef)
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


@functools.cache
def documented_methods() -> set[str]:
    """Return the names of all methods that some class documents: what overrides them needs no docstring of its own."""
    return {
        name.rpartition(".")[2]
        for path in FILES
        for name, node, _ in definitions(ast.parse(path.read_text()))
        if "." in name and ast.get_docstring(node)
    }


def faults(path: Path, documented: set[str]) -> Iterator[str]:
    """Yield the public definitions of a file without a docstring, or with one that begins with a noun phrase."""
    tree = ast.parse(path.read_text())
    module = ast.get_docstring(tree)
    if not module:
        yield "the module"
    if len(path.read_text().splitlines()) > MOST_LINES and f"over {MOST_LINES} lines" not in (module or ""):
        yield f"it is over {MOST_LINES} lines, and its docstring does not say why"
    for name, node, inherits in definitions(tree):
        text = ast.get_docstring(node)
        if not text and not (inherits and node.name in documented):
            yield f"{name} has no docstring"
        if text and text.startswith(NOUNS):
            yield f"{name}: {text.splitlines()[0]!r} has no verb"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_definition_has_a_docstring(path: Path) -> None:
    assert list(faults(path, documented_methods())) == []


if __name__ == "__main__":  # python tests/house/test_docstrings.py FOLDER ...: what is still to do there
    import sys

    for path in FILES:
        if any(path.is_relative_to(ROOT / folder) for folder in sys.argv[1:]):
            for fault in faults(path, documented_methods()):
                print(f"{path.relative_to(ROOT)}: {fault}")
