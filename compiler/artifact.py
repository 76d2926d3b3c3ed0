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

import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from thresher.backends.base import find_backend
from thresher.compiled import Compiled, Proof
from thresher.errors import ArtifactError
from thresher.files import new_zip
from thresher.report import Report
from thresher.signature import Signature

MAGIC, FORMAT = "thresher-artifact", 1
MEMBERS = {"model.so", "weights.safetensors", "proof.safetensors", "program.txt", "report.json"}
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest is small, whatever a damaged header claims


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
            "versions": _versions(),
            "backend": compiled.report.backend,
            "target": compiled.report.target,
            "signature": compiled.signature.to_json(),
            "lowered": lowered,
            "proof": proof,
            "hashes": {name: _hash((directory / name).read_bytes()) for name in sorted(MEMBERS)},
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
    manifest, members = _read(path)
    _check_fit(path, manifest)
    report = Report.from_json(members["report.json"].decode())
    signature = Signature.from_json(manifest["signature"])
    tensors = load_tensors(members["proof.safetensors"])
    proof = Proof(
        *(
            [tensors[v["tensor"]] if "tensor" in v else v["value"] for v in manifest["proof"][side]]
            for side in ("inputs", "outputs")
        )
    )
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        for name in ("model.so", "weights.safetensors"):
            (Path(folder) / name).write_bytes(members[name])
        lowered = find_backend(manifest["backend"]).load(Path(folder), manifest["lowered"])
    return Compiled(signature, lowered, report, members["program.txt"].decode(), proof)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the members, their hashes checked."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as package:
            names = [i.filename for i in package.infolist()]
            if "manifest.json" not in names:
                raise ArtifactError(f"{path} is a zip file, but not a Thresher artifact: it has no manifest.json")
            if package.getinfo("manifest.json").file_size > MANIFEST_LIMIT:
                raise ArtifactError(f"{path} is damaged: its manifest claims more than {MANIFEST_LIMIT} bytes")
            manifest = json.loads(package.read("manifest.json"))
            _check_manifest(path, manifest)
            if len(names) != len(set(names)) or set(names) != MEMBERS | {"manifest.json"}:
                raise ArtifactError(f"{path} is damaged: its members are {sorted(names)}")
            members = {name: package.read(name) for name in MEMBERS}
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ArtifactError(f"{path} is damaged or not a Thresher artifact: {error}") from error
    for name, data in members.items():
        if _hash(data) != manifest["hashes"].get(name):
            raise ArtifactError(f"{path} is damaged: {name} does not have the hash that the manifest states")
    return manifest, members


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("magic") != MAGIC:
        raise ArtifactError(f"{path} is not a Thresher artifact")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')}; this library reads up to {FORMAT}: update thresher, or build it again"
        )
    needed = {"versions", "backend", "target", "signature", "lowered", "proof", "hashes"}
    if missing := needed - manifest.keys():
        raise ArtifactError(f"{path} is damaged: its manifest lacks {sorted(missing)}")


def _check_fit(path: Path, manifest: dict[str, Any]) -> None:
    """The code must fit the runtime and the CPU that are here."""
    built, here = manifest["versions"], _versions()
    if built["tvm"] != here["tvm"]:
        raise ArtifactError(
            f"{path} was built with TVM {built['tvm']}, here is {here['tvm']}; install that version or build it again"
        )
    if built["machine"] != here["machine"]:
        raise ArtifactError(f"{path} was built for {built['machine']} processors, this is {here['machine']}")
    from thresher.backends.tvm.kernels.machine import missing_features

    cpu = manifest["lowered"].get("cpu", "")
    if missing := missing_features(cpu):
        raise ArtifactError(
            f"{path} was built for the CPU {cpu!r}; this one lacks {', '.join(missing)}: "
            "build it for target 'cpu:x86-64-v3' or on this machine"
        )


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {
        "thresher": version("thresher"),
        "tvm": version("apache-tvm"),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


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


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
