"""The examples of docs/authoring.md run, and a package of its own brings a pass along."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from thresher.rewriting import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["pass_by_pattern", "pass_by_analysis", "approximate_pass", "new_operator"])
def test_example(name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip().endswith("proven")


def test_prefill_and_decode_share_their_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It checks every token against the model without a cache."""
    found = runpy.run_path(str(EXAMPLES / "prefill_decode.py"))
    found["main"](str(tmp_path))
    together, alone = (float(word) for word in capsys.readouterr().out.replace(",", "").split() if "." in word)
    assert together < 0.6 * alone


MODEL = """
import torch
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        return -(-self.layer(x))

def make():
    return Twice(), (torch.randn(2, 4),)
"""


def test_third_party(tmp_path: Path) -> None:
    """Installed with pip, found by its entry point, listed, explained, configured on the command line and applied."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for file in (EXAMPLES / "third_party").iterdir():
        if file.is_file():
            (source / file.name).write_text(file.read_text())
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", site, source], check=True)
    (tmp_path / "mymodel.py").write_text(MODEL)

    def thresher(*words: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "thresher.cli.main", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    assert "drop-double-negation{limit=1000}  [exact]" in thresher("passes").stdout
    explained = thresher("passes", "drop-double-negation").stdout
    assert "neg(neg(x))  ->  x" in explained and "option limit: int, default 1000" in explained
    rewritten = thresher("inspect", "mymodel:make", "--passes", "canonicalize;drop-double-negation{limit=5}", "--graph")
    assert "linear" in rewritten.stdout and "neg" not in rewritten.stdout, rewritten.stderr
    stopped = thresher("inspect", "mymodel:make", "--passes", "drop-double-negation{least=5}")
    assert stopped.returncode == 1 and "no option 'least'; its options: limit" in stopped.stderr
