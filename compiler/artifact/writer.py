"""The ahead-of-time package: one zip file with compiled code, its weights, its proof and its report. No pickle anywhere.

    manifest.json           format, versions, for every entry its target and signature, and the SHA-256 of every other member
    weights.safetensors     the constants, packed for their kernels, each once
    ENTRY/model.so          the compiled code; ENTRY/SIZE/model.so, where a batch of any size is computed in pieces of a few sizes
    ENTRY/proof.safetensors probe inputs and the eager model's outputs on them
    ENTRY/program.txt       the rewritten graph, to read
    ENTRY/report.json       what was done and what it gained

An artifact of one model has the one entry ``main``. Loading checks the format, every hash, the versions and the target before a byte of
code is loaded.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from thresher.artifact.bundle import MAIN, Bundle
from thresher.artifact.compiled import Compiled, ReferenceRun
from thresher.atomic_files import new_zip
from thresher.backends.base import Executable, find_backend
from thresher.backends.batched import BatchedExecutable
from thresher.errors import ArtifactError
from thresher.ir.signature import Signature
from thresher.report.data import Report
from thresher.runtime.format import (
    FORMAT,
    MAGIC,
    WEIGHTS,
    check_fit,
    code_members,
    digest,
    members_of,
    read,
    reading,
    versions,
)
from thresher.runtime.weight_store import Weights


def save(models: Mapping[str, Compiled], path: Path) -> Path:
    """Write the artifact. It appears under its name only when it is complete."""
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
            _package(_prepared(models, Path(folder)), Path(folder), path)
    except (OSError, SafetensorError) as error:  # of the folder; what hinders the file itself is named there
        raise ArtifactError(f"cannot prepare {path}: {error}; TMPDIR names a folder with room") from error
    return path


def _prepared(models: Mapping[str, Compiled], directory: Path) -> dict[str, Any]:
    """All members in a folder; returns the manifest."""
    weights = Weights()
    entries = {name: _write_entry(model, directory / name, weights) for name, model in models.items()}
    weights.save(directory / WEIGHTS)
    members = [WEIGHTS, *sorted(m for name, entry in entries.items() for m in members_of(name, entry["lowered"]))]
    return {
        "magic": MAGIC,
        "format": FORMAT,
        "versions": {**versions(), "thresher": version("thresher"), "torch": torch.__version__},
        "entries": entries,
        "hashes": {name: digest((directory / name).read_bytes()) for name in members},
    }


def _package(manifest: dict[str, Any], directory: Path, path: Path) -> None:
    with new_zip(path) as package:
        package.writestr("manifest.json", json.dumps(manifest, indent=1))
        for name in manifest["hashes"]:
            package.write(directory / name, name)


def _write_entry(compiled: Compiled, directory: Path, weights: Weights) -> dict[str, Any]:
    """Its members, and what the manifest says of it."""
    directory.mkdir()
    lowered = compiled.executable.save(directory, weights)
    tensors, proof = _proof_members(compiled.reference_run)
    (directory / "proof.safetensors").write_bytes(save_tensors(tensors))
    (directory / "program.txt").write_text(compiled.text)
    (directory / "report.json").write_text(compiled.report.to_json())
    return {
        "backend": compiled.report.backend,
        "target": compiled.report.target,
        "signature": compiled.signature.to_json(),
        "lowered": lowered,
        "proof": proof,
    }


def load(path: str | Path) -> Compiled | Bundle[Compiled]:
    """Read an artifact, check it, and make it callable: a model, or a :class:`Bundle` of those that are in it.

    Raises :class:`ArtifactError` saying what does not fit: damaged, foreign, newer, or built for another machine.
    """
    path = Path(path)
    manifest, members = read(path)
    with reading(path):
        check_fit(path, manifest)
        weights = Weights.read(members[WEIGHTS])
        models = {name: _loaded(name, entry, members, weights) for name, entry in manifest["entries"].items()}
    return models[MAIN] if set(models) == {MAIN} else Bundle(models)


def load_all(path: str | Path) -> dict[str, Compiled]:
    """Every model of an artifact, by the artifact's name and, where there are several, its own: ``model.thresher[decode]``."""
    found = load(path)
    return {str(path): found} if isinstance(found, Compiled) else {f"{path}[{n}]": m for n, m in found.items()}


def _loaded(name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Compiled:
    report = Report.from_json(members[f"{name}/report.json"].decode())
    signature = Signature.from_json(entry["signature"])
    tensors = load_tensors(members[f"{name}/proof.safetensors"])
    inputs, outputs = (
        [tensors[v["tensor"]] if "tensor" in v else v["value"] for v in entry["proof"][side]]
        for side in ("inputs", "outputs")
    )
    proof = ReferenceRun(inputs, outputs, float(entry["proof"]["steps"]))
    backend, said = find_backend(entry["backend"]), entry["lowered"]
    codes = {code: backend.load(members[f"{name}/{code}"], part, weights) for code, part in code_members(said).items()}
    if "sizes" in said:
        sizes = dict(zip(map(int, said["sizes"]), codes.values()))
        lowered: Executable = BatchedExecutable(
            sizes, said["batched"], {int(s): float(t) for s, t in said["times"].items()}
        )
    else:
        (lowered,) = codes.values()
    return Compiled(signature, lowered, report, members[f"{name}/program.txt"].decode(), proof)


def _proof_members(proof: ReferenceRun) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for safetensors, and the lists that say which leaf is which tensor or which literal."""
    tensors: dict[str, Tensor] = {}
    lists: dict[str, Any] = {"steps": proof.steps}
    for side, values in (("inputs", proof.inputs), ("outputs", proof.outputs)):
        lists[side] = []
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                tensors[f"{side}.{i}"] = value.detach().cpu().contiguous().clone()
                lists[side].append({"tensor": f"{side}.{i}"})
            else:
                lists[side].append({"value": value})
    return tensors, lists
