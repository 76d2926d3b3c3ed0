"""The command line: what each command prints and writes, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from thresher.cli.main import example, main
from thresher.errors import ThresherError

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def with_inputs():
    return make(), (torch.randn(2, 8),)

def samples():
    return torch.randn(8, 2, 8)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "cli_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_build_inspect_validate(here: Path, capsys) -> None:
    assert (
        main(["build", "cli_models:make", "--input", "2x8", "--target", "cpu", "-o", "m.thresher", "--html", "r.html"])
        == 0
    )
    assert "wrote m.thresher" in capsys.readouterr().out and (here / "r.html").exists()
    assert main(["validate", "m.thresher"]) == 0
    assert "ok" in capsys.readouterr().out
    assert main(["inspect", "m.thresher", "--graph"]) == 0
    assert "aten.linear.default" in capsys.readouterr().out
    assert main(["inspect", "m.thresher", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "cpu"
    assert main(["inspect", "m.thresher"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_build_from_pt2_and_from_a_pair(here: Path, capsys) -> None:
    from torch import nn

    torch.export.save(torch.export.export(nn.Linear(8, 2), (torch.randn(1, 8),)), "m.pt2")
    assert main(["build", "m.pt2", "--target", "cpu", "-o", "a.thresher"]) == 0
    passes = "evaluate-constants;fold-channels"
    assert main(["build", "cli_models:with_inputs", "--target", "cpu", "--passes", passes, "-o", "b.thresher"]) == 0
    assert main(["validate", "a.thresher"]) == main(["validate", "b.thresher"]) == 0


def test_build_within_a_budget(here: Path, capsys) -> None:
    given = ["--passes", "exact;drop-sublayers", "--calibration", "cli_models:samples", "--budget", "rel_l2=0.01"]
    assert main(["build", "cli_models:with_inputs", "--target", "cpu", *given, "-o", "c.thresher"]) == 0
    assert main(["build", "cli_models:with_inputs", "--target", "cpu", *given[:-1], "best=1", "-o", "d.thresher"]) == 1
    assert "cannot read the budget 'best=1'" in capsys.readouterr().err and not (here / "d.thresher").exists()


def test_inspect_a_model(here: Path, capsys) -> None:
    assert main(["inspect", "cli_models:make", "--input", "2x8"]) == 0
    assert "fold-channels" in capsys.readouterr().out


def test_passes_lists_options(capsys) -> None:
    assert main(["passes"]) == 0
    assert "fold-channels{strict=False,round_to=0,slack=0.125,min_improvement=1.25}  [exact]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "cli_models:make", "--target", "cpu"], "describe them with --input"),
        (["build", "cli_models:nothing", "--input", "2x8"], "cannot import"),
        (["build", "no_such_module:make", "--input", "2x8"], "cannot import"),
        (["build", "cli_models", "--input", "2x8"], "cannot read"),
        (["build", "cli_models:make", "--input", "2xa"], "cannot read the input"),
        (["build", "cli_models:make", "--input", "2x8:float99"], "unknown dtype"),
        (["build", "cli_models:make", "--input", "2x7", "--target", "cpu"], "could not be exported"),
        (["build", "cli_models:make", "--input", "2x8", "--passes", "none-such"], "unknown pass"),
        (["build", "missing.pt2"], "does not exist"),
        (["validate", "missing.thresher"], "does not exist"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(here: Path, capsys, arguments: list[str], message: str) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(here.glob("*.thresher"))


def test_example_inputs() -> None:
    assert example("2x3").shape == (2, 3) and example("4:int64").dtype is torch.int64
    with pytest.raises(ThresherError):
        example("x")


def test_bench_and_diff(here: Path, capsys) -> None:
    for name, passes in (("a", "exact"), ("b", "exact"), ("c", "none")):
        main(
            [
                "build",
                "cli_models:make",
                "--input",
                "2x8",
                "--target",
                "cpu",
                "--passes",
                passes,
                "-o",
                f"{name}.thresher",
            ]
        )
    main(["build", "cli_models:make", "--input", "3x8", "--target", "cpu", "-o", "d.thresher"])
    capsys.readouterr()
    assert main(["bench", "a.thresher", "c.thresher", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and " ms (" in lines[0] and lines[1].endswith("x the first")
    assert main(["bench", "a.thresher", "--rounds", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["a.thresher"]["median"] > 0
    assert main(["bench", "a.thresher", "--rounds", "0"]) == 1
    capsys.readouterr()
    assert main(["diff", "a.thresher", "b.thresher"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", "a.thresher", "c.thresher"]) == 1
    assert "pass simplify: " in capsys.readouterr().out
    assert main(["diff", "a.thresher", "d.thresher"]) == 1
    found = capsys.readouterr().out
    assert "takes ['input_1: float32 [2, 8]'] | ['input_1: float32 [3, 8]']" in found and "graph -  %relu" in found
    assert "flops" in found and "+50.0 %" in found
