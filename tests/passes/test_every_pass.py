"""Every registered pass has a test file of its own, in the folder of its stage, with a before and an after text, and a test of each
sentence with which it refuses."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from helpers.refusals import PASSES, listed_refusals, sentences
from helpers.registered import OWN
from thresher.rewriting import approximate_pass

#: Refusals that no program reaches, with the reason.
UNREACHED = {
    "queries, keys and values are broadcast against each other": "a reshape that does not fit raises before the shapes are compared",
    "the complex number *": "every rule that passes on a number refuses complex ones itself",
    "several results": "no operator that takes fewer tokens has several results",
    "values of different tokens": "values without the first tokens are shorter: they are not concatenated with others",
}
SHARED = [p for p in PASSES.rglob("_*.py") if p.name != "__init__.py"]


def module_of(name: str) -> Path:
    """Return the path of the module of a pass: ``passes/<stage>/<module>.py``."""
    *_, stage, module = OWN[name].__module__.split(".")
    return PASSES / stage / f"{module}.py"


def file_of(name: str) -> Path:
    """Return the path of the tests of a pass: ``tests/passes/<stage>/test_<module>.py``."""
    module = module_of(name)
    return Path(__file__).parent / module.parent.name / f"test_{module.name}"


@pytest.mark.parametrize("name", OWN)
def test_a_pass_has_a_before_and_an_after_text(name: str) -> None:
    assert file_of(name).exists(), f"there is no {file_of(name)}"
    calls = (n for n in ast.walk(ast.parse(file_of(name).read_text())) if isinstance(n, ast.Call))
    checked = (n.args[0] for n in calls if isinstance(n.func, ast.Name) and n.func.id == "check_rewrite")
    items = [item.value.partition("{")[0] for item in checked if isinstance(item, ast.Constant)]
    assert name in items, f"{file_of(name)} has no check_rewrite({name!r}, before, after)"


@pytest.mark.parametrize("name", OWN)
def test_every_refusal_of_a_pass_is_tested(name: str) -> None:
    """As often as a sentence stands in the module of a pass, its ``REFUSALS`` list it."""
    missing = sentences(module_of(name)) - listed_refusals(file_of(name)) - Counter(UNREACHED.keys())
    assert not missing, f"{file_of(name)} has no REFUSALS entry for {sorted(missing)}"
    assert not listed_refusals(file_of(name)) or "REFUSALS)\ndef test_refusals(" in file_of(name).read_text()


def test_every_refusal_that_passes_share_is_tested() -> None:
    wanted = sum((sentences(path) for path in SHARED), Counter())
    listed = sum((listed_refusals(file_of(name)) - sentences(module_of(name)) for name in OWN), Counter())
    assert not (missing := wanted - listed - Counter(UNREACHED.keys())), f"no REFUSALS entry for {sorted(missing)}"


def test_no_refusal_is_tested_that_no_pass_has() -> None:
    source = {s for path in (*PASSES.rglob("*.py"), Path(approximate_pass.__file__)) for s in sentences(path)}
    listed = {s for name in OWN for s in listed_refusals(file_of(name))}
    assert not (stale := listed - source), f"no pass says {sorted(stale)}"
    assert not (gone := set(UNREACHED) - source), f"no pass says {sorted(gone)}"
