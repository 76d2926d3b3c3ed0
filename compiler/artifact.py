"""The ahead-of-time package: one zip file with the compiled code, its weights, its proof and its report. No pickle anywhere.

    manifest.json         format, versions, target, signature, and the SHA-256 of every other member
    model.so              the compiled code
    weights.safetensors   the constants, packed for their kernels
    proof.safetensors     probe inputs and the eager model's outputs on them
    program.txt           the rewritten graph, to read
    report.json           what was done and what it gained

Loading checks the format, every hash, the versions and the target before a byte of code is loaded.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from thresher.backends.base import find_backend
from thresher.compiled import Compiled, Proof
from thresher.files import new_zip
from thresher.package import FORMAT, MAGIC, MEMBERS, check_fit, digest, read, reading, versions
from thresher.report import Report
from thresher.signature import Signature


def save(compiled: Compiled, path: Path) -> Path:
    """Write the artifact. It appears under its name only when it is complete."""
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        directory = Path(folder)
        lowered = compiled.lowered.save(directory)
        tensors, proof = _proof_members(compiled.proof)
        (directory / "proof.safetensors").write_bytes(save_tensors(tensors))
        (directory / "program.txt").write_text(compiled.text)
        (directory / "report.json").write_text(compiled.report.to_json())
        manifest = {
            "magic": MAGIC,
            "format": FORMAT,
            "versions": {**versions(), "thresher": version("thresher"), "torch": torch.__version__},
            "backend": compiled.report.backend,
            "target": compiled.report.target,
            "signature": compiled.signature.to_json(),
            "lowered": lowered,
            "proof": proof,
            "hashes": {name: digest((directory / name).read_bytes()) for name in sorted(MEMBERS)},
        }
        with new_zip(path) as package:
            package.writestr("manifest.json", json.dumps(manifest, indent=1))
            for name in sorted(MEMBERS):
                package.write(directory / name, name)
    return path


def load(path: str | Path) -> Compiled:
    """Read an artifact, check it, and make it callable.

    Raises :class:`ArtifactError` saying what does not fit: damaged, foreign, newer, or built for another machine.
    """
    path = Path(path)
    manifest, members = read(path)
    with reading(path):
        check_fit(path, manifest)
        return _loaded(manifest, members)


def _loaded(manifest: dict[str, Any], members: dict[str, bytes]) -> Compiled:
    report = Report.from_json(members["report.json"].decode())
    signature = Signature.from_json(manifest["signature"])
    tensors = load_tensors(members["proof.safetensors"])
    inputs, outputs = (
        [tensors[v["tensor"]] if "tensor" in v else v["value"] for v in manifest["proof"][side]]
        for side in ("inputs", "outputs")
    )
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        for name in ("model.so", "weights.safetensors"):
            (Path(folder) / name).write_bytes(members[name])
        lowered = find_backend(manifest["backend"]).load(Path(folder), manifest["lowered"])
    return Compiled(signature, lowered, report, members["program.txt"].decode(), Proof(inputs, outputs))


def _proof_members(proof: Proof) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Tensors for safetensors, and the lists that say which leaf is which tensor or which literal."""
    tensors: dict[str, Tensor] = {}
    lists: dict[str, list] = {}
    for side, values in (("inputs", proof.inputs), ("outputs", proof.outputs)):
        lists[side] = []
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                tensors[f"{side}.{i}"] = value.detach().cpu().contiguous().clone()
                lists[side].append({"tensor": f"{side}.{i}"})
            else:
                lists[side].append({"value": value})
    return tensors, lists
