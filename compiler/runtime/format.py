"""Reading an artifact: the file, its hashes, and whether it fits this machine. Nothing is loaded or run before all of it is checked.

Needs neither torch nor the compiler.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from thresher.artifact.bundle import NAME
from thresher.errors import ArtifactError, ThresherError

MAGIC, FORMAT = "thresher-artifact", 2
CODE, WEIGHTS = "model.so", "weights.safetensors"
MEMBERS = {"proof.safetensors", "program.txt", "report.json"}  # of every entry, and its code
ENTRY = {"backend", "target", "signature", "lowered", "proof"}
MANIFEST_LIMIT = 64 << 20  # bytes; a manifest is small, whatever a damaged header claims


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the members, their hashes checked."""
    if not path.exists():
        raise ArtifactError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as package:
            names = [i.filename for i in package.infolist()]
            if "manifest.json" not in names:
                raise ArtifactError(f"{path} is a zip file, but not a Thresher artifact: it has no manifest.json")
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in package.infolist()):
                raise ArtifactError(f"{path} is damaged: its members are compressed, which none of an artifact is")
            if package.getinfo("manifest.json").file_size > MANIFEST_LIMIT:
                raise ArtifactError(f"{path} is damaged: its manifest claims more than {MANIFEST_LIMIT} bytes")
            manifest = json.loads(package.read("manifest.json"))
            _check_manifest(path, manifest)
            with reading(path):
                entries = manifest["entries"]
                wanted = {WEIGHTS, *(m for entry in entries for m in members_of(entry, entries[entry]["lowered"]))}
            if len(names) != len(set(names)) or set(names) != wanted | {"manifest.json"}:
                raise ArtifactError(f"{path} is damaged: its members are {sorted(names)}")
            members = {name: package.read(name) for name in wanted}
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
        if digest(data) != manifest["hashes"].get(name):
            raise ArtifactError(f"{path} is damaged: {name} does not have the hash that the manifest states")
    return manifest, members


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while the members are interpreted, is damage: they are data, whatever they say."""
    try:
        yield
    except ThresherError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot unpack {path}: {error}; TMPDIR names a folder with room") from error
    except Exception as error:
        raise ArtifactError(
            f"{path} is damaged: its contents do not fit together ({type(error).__name__}: {error})"
        ) from error


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
        if not NAME.fullmatch(name) or not isinstance(entry, dict) or ENTRY - entry.keys():
            raise ArtifactError(f"{path} is damaged: its manifest's entry {name!r} is not complete")


def check_fit(path: Path, manifest: dict[str, Any]) -> None:
    """The code must fit the runtime and the CPU that are here."""
    built, here = manifest["versions"], versions()
    if built["tvm"] != here["tvm"]:
        raise ArtifactError(
            f"{path} was built with TVM {built['tvm']}, here is {here['tvm']}; install that version or build it again"
        )
    if built["machine"] != here["machine"]:
        raise ArtifactError(f"{path} was built for {built['machine']} processors, this is {here['machine']}")
    from thresher.backends.tvm.cpu import missing_features

    for cpu in {p.get("cpu", "") for e in manifest["entries"].values() for p in code_members(e["lowered"]).values()}:
        if missing := missing_features(cpu):
            raise ArtifactError(
                f"{path} was built for the CPU {cpu!r}; this one lacks {', '.join(missing)}: "
                "build it for target 'cpu:x86-64-v3' or on this machine"
            )


def code_members(lowered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the manifest says of an entry's code, by the name of the code: one, or one for each size of batches."""
    if "sizes" not in lowered:
        return {CODE: lowered}
    return {f"{int(size)}/{CODE}": part for size, part in lowered["sizes"].items()}


def members_of(entry: str, lowered: dict[str, Any]) -> set[str]:
    """The members of an entry."""
    return {f"{entry}/{member}" for member in (*MEMBERS, *code_members(lowered))}


def versions() -> dict[str, str]:
    """What compiled code depends on."""
    return {"tvm": version("apache-tvm"), "machine": platform.machine()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
