"""Every registered pass has a test file of its own, at the place of its module, with a before and an after text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.registered import OWN


def test_file(name: str) -> Path:
    """Return the place of the tests of a pass: ``tests/passes/<stage>/test_<module>.py``."""
    *_, stage, module = OWN[name].__module__.split(".")
    return Path(__file__).parent / stage / f"test_{module}.py"


test_file.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OWN)
def test_a_pass_has_a_before_and_an_after_text(name: str) -> None:
    assert test_file(name).exists(), f"there is no {test_file(name)}"
    calls = (n for n in ast.walk(ast.parse(test_file(name).read_text())) if isinstance(n, ast.Call))
    checked = (n.args[0] for n in calls if isinstance(n.func, ast.Name) and n.func.id == "check_rewrite")
    items = [item.value.partition("{")[0] for item in checked if isinstance(item, ast.Constant)]
    assert name in items, f"{test_file(name)} has no check_rewrite({name!r}, before, after)"
