"""Mutants of a pass: which changes are made, which of them are noticed by what, and that nothing is left of them."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import halves
from helpers.cases import CASES
from helpers.equivalent_mutants import REASONS
from thresher.errors import ThresherError
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import find_pass, make_pass
from thresher.testing import Case, Mutant, examine, mutate
from thresher.testing.mutation.forks import Lost, in_forks
from thresher.testing.mutation.pass_modules import importers_of, modules_of
from thresher.testing.mutation.source_edits import SourceEdit, source_edits
from thresher.testing.mutation.test_files import preload, record

QUICK: dict[str, Any] = {"draws": 1, "misses": 40, "dtypes": ()}
TINY: dict[str, Any] = {"draws": 1, "misses": 0, "dtypes": ()}


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pass]:
    """An instance of the pass, from files of its own."""
    folder = tmp_path_factory.mktemp("passes")
    (folder / "halves").mkdir()
    (folder / "halves" / "__init__.py").touch()
    (folder / "halves" / "_numbers.py").write_text(halves.HELPER)
    (folder / "halves" / "drop_halves.py").write_text(halves.PASS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module("halves.drop_halves").DropHalves()
    for name in [name for name in sys.modules if name.partition(".")[0] == "halves"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def mutants(item: Pass) -> dict[str, Mutant]:
    """All its mutants, by the file and the change."""
    return {f"{Path(m.file).name} {m.edit}": m for m in mutate(item, halves.CASE, only=chosen, **QUICK)}


def chosen(file: str, edit: SourceEdit) -> bool:
    """Return whether a change is in a line that the tests look at."""
    return file.endswith("_numbers.py") or edit.line in (17, 25, 27, 35)


# ---------------------------------------------------------------------- changes


def changes(text: str, **namespace: object) -> list[str]:
    return [str(edit) for edit in source_edits(text, namespace)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a = b < c", ["`<` became `<=`"]),
        ("a = b is not c", ["`is not` became `is`"]),
        ("a = (b) == (c)", ["`==` became `!=`"]),
        ("a = b not  in c <= d", ["`not in` became `in`", "`<=` became `<`"]),
        ("a = b and c", ["`and` became `or`", "`b` became `True`", "`c` became `True`"]),
        ("a = not b or c", ["`or` became `and`", "`not b` became `False`", "`c` became `False`"]),
        ("a = not b", ["`not` was left out"]),
        ("a = -(b)", ["`-` was left out"]),
        ("a = b if c == d else e", ["`c == d` became `True`", "`c == d` became `False`"]),
        ("a = [b for b in c if b < d]", ["`b < d` became `True`", "`b < d` became `False`", "`<` became `<=`"]),
        ("a = 3", ["`3` became `4`", "`3` became `2`"]),
        ("a = -1", ["`1` became `2`", "`1` became `0`"]),
        ("a = 0.5", ["`0.5` became `1.5`"]),
        ("a = True", ["`True` became `False`"]),
        ("a = b // c", ["`//` became `*`"]),
        ("a += b", ["`+=` became `-=`"]),
        ("a = b + 'text'", []),
        ("a = [b] * c", []),
        ("a = f'text {b + 1}'", []),
        ("a: Literal[3]", []),
        ("assert a < 3", []),
        ("from a import b", []),
        ("notes = Note.at(node, a if b else c)", []),
        ("if TYPE_CHECKING:\n    a = 1", []),
        ("while a:\n    b()", ["`a` became `False`"]),
        ("def f(a=3):\n    'text'\n    return a", ["`3` became `4`", "`3` became `2`"]),
        ("def f(a):\n    if a:\n        return b\n    return c", ["`a` became `True`", "`a` became `False`"]),
        ("def f(a):\n    b()\n    for c in a:\n        d = c\n        break", ["`b()` became `pass`", "`break` became `pass`"]),
        ("def f(a):\n    if a:\n        b = c\n        return b\n    return a", None),
        ("try:\n    a = b - c\nexcept E:\n    a = 0.5", ["`-` became `+`", "`0.5` became `1.5`"]),
        ("with a(b - c):\n    pass", ["`-` became `+`"]),
    ],
)  # fmt: skip
def test_source_edits(text: str, wanted: list[str] | None) -> None:
    if wanted is None:
        wanted = ["`a` became `True`", "`a` became `False`", "`return b` became `pass`"]
    assert sorted(change.partition(": ")[2] for change in changes(text)) == sorted(wanted)
    for edit in source_edits(text, {}):
        compile(edit.applied(text), "mutant", "exec")
        assert edit.applied(text) != text


def test_arguments_that_have_a_default_are_left_out() -> None:
    def call(a: int, b: int = 1, *, c: int = 2, d: int) -> None: ...

    names = {"call": call, "Case": Case}
    assert changes("call(x, y, c=z, d=w)", **names) == [
        "line 1: `y` was left out",
        "line 1: `c=z` was left out",
    ]
    assert changes("x.module(y, z)", **names) == ["line 1: `z` was left out"]  # as some class has it
    assert changes("call(*x, c=z); list(x); unknown(x)", **names) == []
    (edit,) = source_edits("call(a=x, d=y, \n     c=z)", names)
    assert (edit.line, edit.applied("call(a=x, d=y, \n     c=z)")) == (2, "call(a=x, d=y)")
    assert (edit.old_line, edit.new_line) == ("call(a=x, d=y, c=z)", "call(a=x, d=y)")


def test_an_edit_knows_its_function_and_its_statement() -> None:
    text = "A = 1\nclass C:\n    def f(self):\n        if (a and\n                b):\n            return 2\n        return 3.0\n"
    by_change = {str(edit): edit for edit in source_edits(text, {})}
    assert by_change["line 1: `1` became `2`"].function == "" and not by_change["line 1: `1` became `2`"].reached
    condition = by_change["line 5: `b` became `True`"]
    assert condition.function == "C.f" and list(condition.reached) == [4, 5]
    assert list(by_change["line 7: `3.0` became `4.0`"].reached) == [7]


# ---------------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    ("change", "outcome", "check"),
    [
        ("drop_halves.py line 25: `is_half(inner.args[1])` became `True`", "killed", "near miss"),
        ("drop_halves.py line 25: `factor == 2` became `True`", "killed", "near miss"),
        ("drop_halves.py line 25: `2` became `3`", "killed", "idle"),
        ("drop_halves.py line 27: `notes.append(Note.at(node, \"twice a half\"))` became `pass`", "killed", "idle"),
        ("_numbers.py line 2: `0.5` became `1.5`", "killed", "idle"),
        ("drop_halves.py line 17: `8` became `9`", "survived", ""),
        ("drop_halves.py line 35: `+` became `-`", "not reached", ""),
    ],
)  # fmt: skip
def test_outcomes(mutants: dict[str, Mutant], change: str, outcome: str, check: str) -> None:
    assert (mutants[change].outcome, mutants[change].check) == (outcome, check)
    assert mutants[change].lives == (outcome != "killed")


def test_a_mutant_is_one_line(mutants: dict[str, Mutant]) -> None:
    assert (
        str(mutants["drop_halves.py line 17: `8` became `7`"])
        == "halves/drop_halves.py line 17: `8` became `7`: survived"
    )
    assert str(mutants["_numbers.py line 2: `0.5` became `1.5`"]).endswith("`0.5` became `1.5`: killed by idle")


def test_nothing_is_left_of_a_mutant(item: Pass, mutants: dict[str, Mutant]) -> None:
    module = sys.modules[type(item).__module__]
    assert Path(str(module.__file__)).read_text() == halves.PASS and module.DropHalves is type(item)
    assert not examine(item, halves.CASE, **QUICK)
    assert len(mutants) > 15


def test_an_endless_loop_is_ended(item: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thresher.testing.mutation.mutants.SLACK", 1.0)
    monkeypatch.setattr("thresher.testing.mutation.mutants.FACTOR", 1.0)
    (mutant,) = mutate(item, halves.CASE, only=lambda file, edit: edit.before == "+=", **TINY)
    assert mutant.outcome == "timeout" and mutant.killed


def test_tests_notice_what_the_cases_do_not(item: Pass, tmp_path: Path) -> None:
    test = tmp_path / "test_limit.py"
    test.write_text(
        "from halves.drop_halves import DropHalves\n\n\ndef test_limit():\n    assert DropHalves().limit == 8\n"
    )
    (mutant, _) = mutate(item, halves.CASE, tests=[str(test)], only=lambda file, edit: edit.line == 17, **TINY)
    assert mutant.outcome == "killed" and mutant.by_test and mutant.check.endswith("test_limit.py::test_limit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def test_wrong():\n    assert False\n", "test_wrong fails before anything is changed: mend it first"),
        ("import no_such_module\n", "fails before anything is changed"),
        ("", r"pytest finds no test in .*test_bad_0.py"),
    ],
)
def test_tests_that_say_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / f"test_bad_{len(text)}.py"  # a name is imported once
    file.write_text(text)
    with pytest.raises(ThresherError, match=message):
        record([str(file)], [])


def test_tests_that_cannot_be_imported_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "test_not_imported.py"
    file.write_text("import no_such_module\n")
    with pytest.raises(ThresherError, match=r"test_not_imported.py cannot be imported by pytest: mend it first"):
        preload([str(file)])


def test_a_reason_explains_a_mutant(item: Pass) -> None:
    reasons = {("halves/drop_halves.py", "limit: int = 8", "limit: int = 9"): "no case has so many"}
    more, fewer = mutate(item, halves.CASE, reasons=reasons, only=lambda file, edit: edit.line == 17, **TINY)
    assert not more.lives and fewer.lives
    assert str(more).endswith("survived, which is right: no case has so many")


def test_a_pass_with_findings_is_not_mutated(item: Pass) -> None:
    idle = Case("other", lambda: (halves.nn.ReLU(), (halves.torch.randn(2),)))
    with pytest.raises(ThresherError, match="has findings before anything is changed: idle"):
        mutate(item, idle, **QUICK)
    with pytest.raises(ThresherError, match="without a case every mutant survives"):
        mutate(item)


def test_a_sample_of_a_pass_of_ours() -> None:
    """Its class stands in a table of pipelines and in the registry, too."""
    mutants = mutate("fold-scale", *CASES["fold-scale"], limit=6, draws=1, dtypes=(), misses=20)
    assert len(mutants) == 6 and any(mutant.killed for mutant in mutants)
    assert type(make_pass("fold-scale")) is find_pass("fold-scale")


# ---------------------------------------------------------------------- modules and processes


def test_the_modules_of_a_pass_are_its_own_and_its_helpers() -> None:
    names = [m.__name__.removeprefix("thresher.passes.") for m in modules_of(find_pass("skip-zeros"))]
    assert names == ["sparsity.skip_zeros", "sparsity._densities", "sparsity._linear_layers"]
    names = [m.__name__.removeprefix("thresher.passes.") for m in modules_of(find_pass("fold-channels"))]
    assert names[:1] == ["fold.fold_channels"] and "fold._edge_markers" in names


def test_importers_come_after_what_they_import() -> None:
    import thresher.passes.pipelines  # noqa: F401

    names = [m.__name__ for m in importers_of(sys.modules["thresher.passes.sparsity._linear_layers"])]
    assert names.index("thresher.passes.sparsity.skip_zeros") < names.index("thresher.passes.pipelines")
    assert "thresher.passes.fold.fold_scale" not in names


def test_a_call_has_a_process_of_its_own() -> None:
    calls = [os.getpid, lambda: time.sleep(60), lambda: os._exit(3), lambda: sys.modules.pop("os").getpid()]
    answers = dict(in_forks(calls, 2, lambda index: 20.0 if index != 1 else 0.2))
    assert answers[1] == Lost(timeout=True) and answers[2] == Lost(timeout=False)
    assert len({answers[0], answers[3], os.getpid()}) == 3 and "os" in sys.modules


def test_every_explained_mutant_is_one() -> None:
    """A reason whose lines are gone explains nothing."""
    for (file, before, after), reason in REASONS.items():
        module = importlib.import_module(f"thresher.passes.{file.removesuffix('.py').replace('/', '.')}")
        edits = source_edits(Path(str(module.__file__)).read_text(), vars(module))
        assert any((edit.old_line, edit.new_line) == (before, after) for edit in edits), (file, before, after)
        assert " " in reason
