"""Names and versions of the artifact's format, and the reading of the file. Nothing is loaded or run before all of it is checked.

    manifest.json                   format, versions, for every entry its target and signature, and the SHA-256 of every other member
    weights.safetensors             the constants, packed for their kernels, each once
    ENTRY/model.so                  the compiled code; ENTRY/SIZE/model.so, where a batch of any size is computed in pieces of a few sizes
    ENTRY/reference_run.safetensors example inputs (and the state before the first call) and the eager model's outputs on them
    ENTRY/program.txt               the rewritten graph, to read
    ENTRY/report.json               the passes and the gain

An artifact of one model has the one entry ``main``. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thresher.errors import ArtifactError
from thresher.runtime.package import damage_named, read_package

MAGIC, FORMAT = "thresher-artifact", 4
MANIFEST, CODE, WEIGHTS = "manifest.json", "model.so", "weights.safetensors"
REFERENCE_RUN, PROGRAM, REPORT = "reference_run.safetensors", "program.txt", "report.json"
MEMBERS = {REFERENCE_RUN, PROGRAM, REPORT}  # of every entry, and its code
ENTRY_KEYS = {"backend", "target", "signature", "code", "reference_run"}
MAIN = "main"  # the name of the only model of an artifact
NAME = re.compile(r"[A-Za-z_]\w{0,63}")


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the members, their hashes checked. Raise :class:`ArtifactError` for what is damaged or foreign."""

    def members(manifest: Any) -> set[str]:
        _check_manifest(path, manifest)
        with damage_named(path):
            entries = manifest["entries"]
            return {WEIGHTS, *(m for name, entry in entries.items() for m in members_of(name, entry["code"]))}

    manifest, contents = read_package(path, "a Thresher artifact", MANIFEST, members)
    for name, data in contents.items():
        if digest(data) != manifest["hashes"].get(name):
            raise ArtifactError(f"{path} is damaged: {name} does not have the hash that the manifest states")
    return manifest, contents


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("magic") != MAGIC:
        raise ArtifactError(f"{path} is not a Thresher artifact")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.get('format')}; this library reads {FORMAT}: build it again, or use the version that built it"
        )
    if missing := {"versions", "entries", "hashes"} - manifest.keys():
        raise ArtifactError(f"{path} is damaged: its manifest lacks {sorted(missing)}")
    if not all(isinstance(manifest[key], dict) for key in ("entries", "hashes")) or not manifest["entries"]:
        raise ArtifactError(f"{path} is damaged: its manifest has no entries or no hashes")
    for name, entry in manifest["entries"].items():
        if not NAME.fullmatch(name) or not isinstance(entry, dict) or ENTRY_KEYS - entry.keys():
            raise ArtifactError(f"{path} is damaged: its manifest's entry {name!r} is not complete")


def code_members(code: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the manifest's description of an entry's code by the name of its member: one, or one for each size of batches."""
    if "sizes" not in code:
        return {CODE: code}
    return {f"{int(size)}/{CODE}": description for size, description in code["sizes"].items()}


def members_of(entry: str, code: dict[str, Any]) -> set[str]:
    """Return the names of all members of an entry."""
    return {f"{entry}/{member}" for member in (*MEMBERS, *code_members(code))}


def versions() -> dict[str, str]:
    """Return the versions that compiled code depends on."""
    return {"tvm": version("apache-tvm"), "machine": platform.machine()}


def digest(data: bytes) -> str:
    """Return the SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
