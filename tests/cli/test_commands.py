"""Commands: what each prints and writes, and errors of one line with exit code 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import thresher
from thresher.cli.main import main
from thresher.rewriting import registry

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

PASS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from thresher.authoring import Pass, PassResult, register_pass

@register_pass
@dataclass(frozen=True)
class DoNothing(Pass):
    name: ClassVar[str] = "do-nothing"
    times: int = 1
    def apply(self, program, context):
        return PassResult(program)

def make():
    return torch.nn.Linear(4, 3), (torch.randn(2, 4),)
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
    with pytest.raises(SystemExit):
        main(["build", "cli_models:with_inputs", "--target", "cpu", *given[:-1], "best=1", "-o", "d.thresher"])
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


def test_inspect_prints_one_json_document(here: Path, capsys) -> None:
    """The report of one model, as it always was; of a bundle an object by the names of its models."""
    for name, passes in (("a", "exact"), ("b", "none")):
        main(["build", "cli_models:with_inputs", "--target", "cpu", "--passes", passes, "-o", f"{name}.thresher"])
    assert main(["bundle", "small=a.thresher", "large=b.thresher"]) == 0
    capsys.readouterr()
    assert main(["inspect", "bundle.thresher", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    bundle = thresher.load("bundle.thresher")
    assert reports == {name: json.loads(bundle[name].report.to_json()) for name in ("small", "large")}


def test_a_pass_beside_the_model(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are looked up after the model is imported: its module may register one."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (here / "cli_passes.py").write_text(PASS)
    assert main(["inspect", "cli_passes:make", "--passes", "exact;do-nothing{times=2}"]) == 0
    assert "do-nothing" in capsys.readouterr().out


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
    assert main(["diff", "a.thresher", "b.thresher"]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert main(["diff", "a.thresher", "c.thresher"]) == 1
    assert "pass fold-channels: " in capsys.readouterr().out
    assert main(["diff", "a.thresher", "d.thresher"]) == 1
    found = capsys.readouterr().out
    assert "takes ['input_1: float32 [2, 8]'] | ['input_1: float32 [3, 8]']" in found and "graph -  %relu" in found
    assert "flops" in found and "+50.0 %" in found
