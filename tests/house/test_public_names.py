"""The names that ``thresher`` and ``thresher.authoring`` promise, and what importing them costs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import thresher
import thresher.authoring

ROOT = Path(__file__).parents[2]
PUBLIC = [
    "Budget",
    "Bundle",
    "Compiled",
    "ThresherError",
    "Tune",
    "capture",
    "compile",
    "load",
    "lower",
    "read_onnx",
    "rewrite",
]
#: Packages that are slow to import and that few programs need.
HEAVY = {"tvm", "onnx", "onnxruntime", "jinja2", "networkx", "scipy", "rich", "torch"}
AFTER_COMPILE = {"networkx", "torch"}  # the first for ties between slices


def loaded_after(statement: str) -> set[str]:
    """Return which heavy packages a new process has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*{HEAVY} & set(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_public_names() -> None:
    assert thresher.__all__ == PUBLIC == sorted(thresher._MODULES)
    assert set(PUBLIC) <= set(dir(thresher))
    for name in PUBLIC:
        assert getattr(thresher, name).__module__ == thresher._MODULES[name]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        thresher.nothing  # noqa: B018


def test_type_checkers_see_the_same_modules() -> None:
    tree = ast.parse(Path(thresher.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If))
    imports = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert imports == thresher._MODULES


def test_names_of_authors() -> None:
    names = thresher.authoring.__all__
    assert names == sorted(names) and not set(names) & set(PUBLIC)
    assert all(hasattr(thresher.authoring, name) for name in names)


def test_no_name_hides_a_module() -> None:
    """A package's attribute that has the name of one of its modules is that module."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    modules = [(p, m.name) for p in packages for m in pkgutil.iter_modules(importlib.import_module(p).__path__)]
    assert ("thresher.driver", "compile") in modules
    for package, name in modules:
        importlib.import_module(f"{package}.{name}")
    for package, name in modules:
        assert getattr(sys.modules[package], name) is sys.modules[f"{package}.{name}"], f"{package}.{name}"


@pytest.mark.parametrize(
    ("statement", "packages"),
    [
        ("import thresher", set()),
        ("import thresher; thresher.ThresherError, thresher.Bundle", set()),
        ("import thresher; thresher.load, thresher.compile", AFTER_COMPILE),
        ("import thresher.authoring", AFTER_COMPILE),
    ],
)
def test_imports_are_cheap(statement: str, packages: set[str]) -> None:
    assert loaded_after(statement) == packages


def test_operators_are_registered_where_they_are_used() -> None:
    """``import thresher`` registers no operator, so whoever names ``torch.ops.thresher`` imports ``thresher.ops``."""
    for top in ("compiler", "passes", "backends", "models", "tests", "examples", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            if "torch.ops.thresher" in text and path != Path(__file__):
                assert "import thresher.ops" in text or "from thresher.ops" in text, path


def test_without_torch() -> None:
    """Artifacts run; everything else says what to install. That they do run is tests/artifact/test_numpy_reader.py."""
    code = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import thresher
print(thresher.load.__module__, thresher.ThresherError.__module__)
try:
    thresher.compile
except ImportError as error:
    print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0] == "thresher.artifact.numpy_reader thresher.errors"
    assert lines[1].startswith("thresher.compile needs torch: pip install torch")
