"""The writing of an artifact (:mod:`thresher.runtime.format`). It takes what it writes, and knows no class of models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors

from thresher.atomic_files import new_zip
from thresher.backends.base import Executable
from thresher.errors import ArtifactError
from thresher.report.report import Report
from thresher.runtime.format import (
    FORMAT,
    MAGIC,
    MANIFEST,
    PROGRAM,
    REFERENCE_RUN,
    REPORT,
    WEIGHTS,
    digest,
    members_of,
    versions,
)
from thresher.runtime.reference_run import ReferenceRun
from thresher.runtime.signature import Signature
from thresher.runtime.weight_store import Weights


class Entry(Protocol):
    """The parts of a compiled model that an artifact holds."""

    signature: Signature
    executable: Executable
    report: Report
    text: str
    reference_run: ReferenceRun


def save(models: Mapping[str, Entry], path: Path) -> Path:
    """Write the artifact; it appears under its name only when it is complete.

    Raises :class:`ArtifactError` where it cannot be written, :class:`BackendError` where a backend's code cannot be saved.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
            _package(_prepare(models, Path(folder)), Path(folder), path)
    except (OSError, SafetensorError) as error:  # of the folder; what hinders the file itself is named there
        raise ArtifactError(f"cannot prepare {path}: {error}; TMPDIR names a folder with room") from error
    return path


def _prepare(models: Mapping[str, Entry], directory: Path) -> dict[str, Any]:
    """Write all members into a folder and return the manifest."""
    weights = Weights()
    entries = {name: _write_entry(model, directory / name, weights) for name, model in models.items()}
    weights.save(directory / WEIGHTS)
    members = [WEIGHTS, *sorted(m for name, entry in entries.items() for m in members_of(name, entry["code"]))]
    return {
        "magic": MAGIC,
        "format": FORMAT,
        "versions": {**versions(), "thresher": version("thresher"), "torch": torch.__version__},
        "entries": entries,
        "hashes": {name: digest((directory / name).read_bytes()) for name in members},
    }


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors as safetensors takes them; it has no complex128, so complex ones are two, named ``.real`` and ``.imag``."""
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts |= {f"{name}.real": tensor.real, f"{name}.imag": tensor.imag} if tensor.is_complex() else {name: tensor}
    return {name: t.detach().cpu().resolve_neg().contiguous().clone() for name, t in parts.items()}


def _package(manifest: dict[str, Any], directory: Path, path: Path) -> None:
    with new_zip(path) as package:
        package.writestr(MANIFEST, json.dumps(manifest, indent=1))
        for name in manifest["hashes"]:
            package.write(directory / name, name)


def _write_entry(model: Entry, directory: Path, weights: Weights) -> dict[str, Any]:
    """Write the members of an entry and return its part of the manifest."""
    directory.mkdir()
    code = model.executable.save(directory, weights)
    reference_run, tensors = model.reference_run.to_json()
    (directory / REFERENCE_RUN).write_bytes(save_tensors(_storable(tensors)))
    (directory / PROGRAM).write_text(model.text)
    (directory / REPORT).write_text(model.report.to_json())
    return {
        "backend": model.report.backend,
        "target": model.report.target,
        "signature": model.signature.to_json(),
        "code": code,
        "reference_run": reference_run,
    }
