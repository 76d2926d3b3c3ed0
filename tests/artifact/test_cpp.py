"""The C++ example: compiled, and held to what Python's loader does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

import thresher

HERE = all(map(shutil.which, ("make", "g++"))) and Path("/usr/include/openssl/evp.h").exists()
pytestmark = pytest.mark.skipif(
    not HERE, reason="needs make, g++ and OpenSSL's headers (Debian: make, g++, libssl-dev)"
)
SOURCES = Path(__file__).parents[2] / "examples" / "cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by its Makefile, in a folder of its own."""
    folder = tmp_path_factory.mktemp("cpp")
    for name in ("Makefile", "run.cpp", "thresher.hpp"):
        shutil.copy(SOURCES / name, folder)
    done = subprocess.run(["make", f"PYTHON={sys.executable}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    return folder / "run"


def run(program: Path, path: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TVM", "PYTHON"))}
    return subprocess.run([program, path, "2"], capture_output=True, text=True, env=environment)


def test_it_runs_every_entry_and_proves_it(program: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    small = thresher.compile(model, (torch.randn(2, 3, 8, 8),), target="cpu")
    batch = {"input": {0: torch.export.Dim("batch")}}
    free = thresher.compile(model, (torch.randn(11, 3, 8, 8),), target="cpu", dynamic_shapes=batch)
    done = run(program, thresher.Bundle({"small": small, "free": free}).save(tmp_path / "m.thresher"))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"takes \w+: float32 (\w+) 3 8 8", done.stdout)[1:] == ["2"]
    errors = [float(e) for e in re.findall(r"error (.*)", done.stdout)]
    assert len(errors) == 2 and max(errors) < 1e-5


def test_integers_and_several_results(program: Path, tmp_path: Path) -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(50, 8), nn.Linear(8, 4)

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.layer(self.table(ids))
            return y, y.argmax(-1)

    compiled = thresher.compile(Looked().eval(), (torch.tensor([[3, 4]]),), target="cpu")
    done = run(program, compiled.save(tmp_path / "m.thresher"))
    assert done.returncode == 0 and "takes ids: int64 1 2" in done.stdout, done.stderr


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, scale: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        y.add_(x * scale)
        return y * self.steps


def test_state_goes_in_and_comes_out(program: Path, tmp_path: Path) -> None:
    compiled = thresher.compile(Counts().eval(), (2.0, torch.ones(3), torch.zeros(3)), target="cpu")
    done = run(program, compiled.save(tmp_path / "m.thresher"))
    assert done.returncode == 0 and "takes steps: float32 3" in done.stdout, done.stderr
    assert sorted(re.findall(r"writes (\w+)", done.stdout)) == ["steps", "y"]
    assert float(re.findall(r"error (.*)", done.stdout)[0]) < 1e-6


def test_what_is_damaged_is_refused(program: Path, tmp_path: Path) -> None:
    path = thresher.compile(nn.Linear(4, 2), (torch.randn(1, 4),), target="cpu").save(tmp_path / "m.thresher")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as package:
        members = {n: package.read(n) for n in package.namelist()}
    place = data.find(members["main/model.so"][:64])

    def with_manifest(old: bytes, new: bytes) -> bytes:
        with zipfile.ZipFile(tmp_path / "edited", "w") as package:
            for name, content in members.items():
                package.writestr(name, content.replace(old, new) if name == "manifest.json" else content)
        return (tmp_path / "edited").read_bytes()

    cases = {
        "does not have the hash": data[:place] + b"\0" + data[place + 1 :],
        "is damaged or not": data[: len(data) // 2],
        "has another format": with_manifest(b'"format": 4', b'"format": 9'),
        "was built with TVM 0.1": with_manifest(f'"tvm": "{version("apache-tvm")}"'.encode(), b'"tvm": "0.1"'),
        "lacks signature": with_manifest(b'"signature"', b'"other"'),
        "cannot read JSON": with_manifest(b"{", b"[{"),
    }
    for words, content in cases.items():
        (tmp_path / "bad.thresher").write_bytes(content)
        done = run(program, tmp_path / "bad.thresher")
        assert done.returncode == 1 and words in done.stderr, (words, done.stderr, done.stdout)
