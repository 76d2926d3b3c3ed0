"""The artifact: complete on disk, proven where it is loaded, and clear about everything that does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import thresher
from thresher.errors import ArtifactError, InputError, ValidationError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    compiled = thresher.compile(model, (torch.randn(2, 3, 8, 8),), target="cpu")
    return compiled.save(tmp_path_factory.mktemp("artifact") / "m.thresher")


def repacked(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of an artifact with its members changed."""
    with zipfile.ZipFile(source) as package:
        members = {n: package.read(n) for n in package.namelist()}
    change(members)
    with zipfile.ZipFile(target, "w") as package:
        for name, data in members.items():
            package.writestr(name, data)
    return target


def edited_manifest(**changes) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"])
        for key, value in changes.items():
            if isinstance(value, dict):
                manifest[key].update(value)
            else:
                manifest[key] = value
        members["manifest.json"] = json.dumps(manifest).encode()

    return change


def test_round_trip(artifact: Path) -> None:
    loaded = thresher.load(artifact)
    assert loaded.validate()[0].passed
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.from_numpy(loaded(x.numpy())), loaded(x))
    assert "linear" in loaded.text and loaded.report.target == "cpu"


def test_another_process_needs_no_model_code(artifact: Path) -> None:
    script = f"import thresher, torch; print(thresher.load({str(artifact)!r})(torch.zeros(2, 3, 8, 8)).shape)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([2, 5])", done.stderr


def test_no_pickle_inside(artifact: Path) -> None:
    with zipfile.ZipFile(artifact) as package:
        assert sorted(package.namelist()) == [
            "main/model.so",
            "main/program.txt",
            "main/reference_run.safetensors",
            "main/report.json",
            "manifest.json",
            "weights.safetensors",
        ]


def test_missing_file() -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        thresher.load("no/such/file.thresher")


@pytest.mark.parametrize(
    "member",
    ["main/model.so", "weights.safetensors", "main/reference_run.safetensors", "main/program.txt", "main/report.json"],
)
def test_a_changed_byte_is_found_before_anything_is_loaded(artifact: Path, tmp_path: Path, member: str) -> None:
    def flip(members: dict[str, bytes]) -> None:
        data = bytearray(members[member])
        data[len(data) // 2] ^= 1
        members[member] = bytes(data)

    with pytest.raises(ArtifactError, match=f"{member} does not have the hash"):
        thresher.load(repacked(artifact, tmp_path / "m.thresher", flip))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_truncated(artifact: Path, tmp_path: Path, part: float) -> None:
    data = artifact.read_bytes()
    (tmp_path / "m.thresher").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match="damaged or not a Thresher artifact"):
        thresher.load(tmp_path / "m.thresher")


def test_foreign_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "foreign.zip", "w") as package:
        package.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match="no manifest"):
        thresher.load(tmp_path / "foreign.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as package:
        package.writestr("manifest.json", '{"magic": "something else"}')
    with pytest.raises(ArtifactError, match="not a Thresher artifact"):
        thresher.load(tmp_path / "other.zip")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited_manifest(format=99), "format 99; this library reads 4"),
        (edited_manifest(format=1), "format 1; this library reads 4"),
        (edited_manifest(format=2), "format 2; this library reads 4"),
        (edited_manifest(entries={"../main": {}}), "entry '../main' is not complete"),
        (edited_manifest(entries={"other": {}}), "entry 'other' is not complete"),
        (edited_manifest(versions={"tvm": "0.1"}), "built with TVM 0.1"),
        (edited_manifest(versions={"machine": "riscv64"}), "built for riscv64"),
        (lambda m: m.pop("weights.safetensors"), "its members are"),
        (lambda m: m.update({"../../evil.py": b"x"}), "its members are"),
        (lambda m: m.update({"manifest.json": b"{"}), "damaged"),
        (lambda m: m.update({"manifest.json": b'{"magic": "thresher-artifact", "format": 4}'}), "lacks"),
    ],
)
def test_what_does_not_fit_is_named(artifact: Path, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        thresher.load(repacked(artifact, tmp_path / "m.thresher", change))


def test_code_for_another_cpu(artifact: Path, monkeypatch) -> None:
    from thresher.backends.tvm import cpu

    built = cpu.features("sapphirerapids")
    monkeypatch.setattr(cpu, "features", lambda cpu: frozenset() if cpu == cpu.cpu_name() else built)
    monkeypatch.setattr(cpu, "cpu_name", lambda: "old")
    monkeypatch.setattr(cpu, "features", lambda cpu: frozenset() if cpu == "old" else built)
    with pytest.raises(ArtifactError, match="this one lacks"):
        thresher.load(artifact)


def test_a_wrong_result_is_found(artifact: Path) -> None:
    loaded = thresher.load(artifact)
    loaded.reference_run.outputs[0] = loaded.reference_run.outputs[0] + 1.0
    with pytest.raises(ValidationError, match="stored probe"):
        loaded.validate()


def test_saving_where_nothing_can_be_written(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        thresher.Compiled.save(_compiled(), tmp_path / "file" / "m.thresher")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _compiled() -> thresher.Compiled:
    return thresher.compile(nn.Linear(4, 2), (torch.randn(1, 4),), target="cpu")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 3, 8, 9),), r"shape \(2, 3, 8, 9\), but the model was compiled for \(2, 3, 8, 8\)"),
        ((torch.randn(3, 8, 8),), "has shape"),
        ((torch.randn(2, 3, 8, 8).double(),), "dtype float64, but the model was compiled for float32"),
        ((torch.randn(2, 3, 8, 8, device="meta"),), r"is on meta, but the model was compiled for cpu"),
        (([1, 2],), "structure"),
        ((3,), "must be a tensor"),
        ((np.zeros((2, 3, 8, 8)),), "dtype float64"),
        ((torch.randn(2, 3, 8, 8), torch.randn(1)), "structure"),
    ],
)
def test_wrong_inputs_are_named(artifact: Path, inputs: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        thresher.load(artifact)(*inputs)
