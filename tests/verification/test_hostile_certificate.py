"""A certificate that is damaged or made to harm: the reader says what is wrong, and nothing else happens."""

from __future__ import annotations

import json
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import thresher
from helpers.hostile_zips import TRICKS
from thresher.errors import ArtifactError
from thresher.verification.certificate import Certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight[5:] = 0
        model[0].bias[5:] = 0
    made = thresher.rewrite(model, (torch.randn(2, 8),)).certificate
    return made.save(tmp_path_factory.mktemp("certificate") / "m.certificate")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", TRICKS)
def test_tricks_with_the_package(certificate: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.certificate"
    TRICKS[name](certificate, path, "tensors.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match="damaged"):
        Certificate.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KB: a bomb is not unpacked
    assert [p.name for p in tmp_path.iterdir()] == ["m.certificate"]


@pytest.mark.parametrize("claims", [b"[]", b"{", b'{"format": "x"}', b'{"format": 1, "steps": [{}]}', b"[" * 100_000])
def test_claims_that_make_no_sense(certificate: Path, tmp_path: Path, claims: bytes) -> None:
    path = tmp_path / "m.certificate"
    with zipfile.ZipFile(certificate) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("certificate.json", claims)
        new.writestr("tensors.safetensors", old.read("tensors.safetensors"))
    with pytest.raises(ArtifactError, match="damaged"):
        Certificate.load(path)


def test_a_newer_format_and_other_files(certificate: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.certificate"
    with zipfile.ZipFile(certificate) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("certificate.json", json.dumps({"format": 9, "steps": []}))
        new.writestr("tensors.safetensors", old.read("tensors.safetensors"))
    with pytest.raises(ArtifactError, match="format 9; this library reads up to 1: update thresher"):
        Certificate.load(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Certificate.load(tmp_path / "missing")
    path.write_bytes(b"no zip file")
    with pytest.raises(ArtifactError, match="damaged or not a certificate"):
        Certificate.load(path)
    with zipfile.ZipFile(path, "w") as new:
        new.writestr("readme.txt", "hello")
    with pytest.raises(ArtifactError, match=r"not a certificate: it has no certificate\.json"):
        Certificate.load(path)
