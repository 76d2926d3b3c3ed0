"""``thresher prove``: its findings, its mutants, and what is wrong with its arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers import halves
from thresher.cli.main import main

CASES = f"{halves.__name__}:CASES"
QUICK = ("--draws", "1", "--misses", "12", "--dtypes", "")


@pytest.fixture
def item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The class of the pass, as the command takes it, from files of its own."""
    (tmp_path / "halves").mkdir()
    (tmp_path / "halves" / "_numbers.py").write_text(halves.HELPER)
    (tmp_path / "halves" / "drop_halves.py").write_text(halves.PASS)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "halves"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "halves.drop_halves:DropHalves"


def test_findings(item: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["prove", item, CASES, *QUICK]) == 0
    assert capsys.readouterr().out == "findings: 0; cases: 1\n"
    assert main(["prove", "fold-scale", f"{halves.__name__}:CASE", *QUICK]) == 1
    out = capsys.readouterr().out
    assert out == "idle: halves: fold-scale rewrote nothing, in no size\nfindings: 1; cases: 1\n"


def test_mutants(item: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["prove", item, CASES, *QUICK, "--mutate", "--only", "*:is_half"]) == 0
    assert capsys.readouterr().out == "2 mutants: 2 killed by the cases, 0 by the tests, 0 explained, 0 live\n"
    reasons = {("halves/drop_halves.py", "return number + 1", "return number - 1"): "nobody calls it"}
    sys.modules[halves.__name__].REASONS = reasons  # type: ignore[attr-defined]
    arguments = ["--mutate", "--only", "*:_never", "--reasons", f"{halves.__name__}:REASONS"]
    assert main(["prove", item, CASES, *QUICK, *arguments]) == 1
    *lives, last = capsys.readouterr().out.splitlines()
    assert lives[0] == "halves/drop_halves.py line 35: `1` became `2`: not reached"
    assert last == "3 mutants: 0 killed by the cases, 0 by the tests, 1 explained, 2 live"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold-scale", "no_such_module:CASES"], "cannot import 'no_such_module:CASES'"),
        (["fold-scale", CASES], "has no cases of 'fold-scale'; it has those of drop-halves"),
        (["no-such-pass", f"{halves.__name__}:CASE"], "unknown pass 'no-such-pass'"),
        (["fold-scale", f"{halves.__name__}:build"], "is no Case, no list of cases and no dict"),
        ([f"{halves.__name__}:build", CASES], "is no class; give the class of a pass, or the name of a registered one"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["prove", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "float99"], "argument --dtypes: cannot read the dtypes 'float99': write names of torch such as"),
        (["--misses", "-1"], "argument --misses: must be at least 0, not -1"),
        (["--draws", "0"], "argument --draws: must be at least 1, not 0"),
    ],
)
def test_arguments_that_cannot_be_read(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["prove", "fold-scale", CASES, *arguments])
    assert message in capsys.readouterr().err
