"""The loading of an artifact where torch is. Format, hashes, versions and target are checked before a byte of code is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from thresher.artifact.bundle import Bundle
from thresher.artifact.compiled import Compiled
from thresher.artifact.fit import check_fit
from thresher.backends.base import Executable, find_backend
from thresher.backends.batched import BatchedExecutable
from thresher.ir.signature import read_tree
from thresher.report.report import Report
from thresher.runtime.format import MAIN, PROGRAM, REFERENCE_RUN, REPORT, WEIGHTS, code_members, read
from thresher.runtime.package import damage_named
from thresher.runtime.reference_run import ReferenceRun
from thresher.runtime.signature import Signature
from thresher.runtime.weight_store import Weights


def load(path: str | Path) -> Compiled | Bundle[Compiled]:
    """Read an artifact, check it, and make it callable: a model, or a :class:`Bundle` of those that are in it.

    Raises :class:`ArtifactError` saying what does not fit: damaged, foreign, newer, or built for another machine.
    """
    path = Path(path)
    manifest, members = read(path)
    with damage_named(path):
        check_fit(path, manifest)
        weights = Weights.read(members[WEIGHTS])
        models = {name: _load_entry(name, entry, members, weights) for name, entry in manifest["entries"].items()}
    return models[MAIN] if set(models) == {MAIN} else Bundle(models)


def load_all(path: str | Path) -> dict[str, Compiled]:
    """Return every model of an artifact, by the artifact's name and, where there are several, its own: ``model.thresher[decode]``."""
    loaded = load(path)
    return {str(path): loaded} if isinstance(loaded, Compiled) else {f"{path}[{n}]": m for n, m in loaded.items()}


def _load_entry(name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Compiled:
    return Compiled(
        Signature.from_json(entry["signature"], read_tree),
        _load_executable(name, entry, members, weights),
        Report.from_json(members[f"{name}/{REPORT}"].decode()),
        members[f"{name}/{PROGRAM}"].decode(),
        ReferenceRun.from_json(entry["reference_run"], _with_complex(load_tensors(members[f"{name}/{REFERENCE_RUN}"]))),
    )


def _with_complex(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with those put together that are stored as ``.real`` and ``.imag``."""
    names = [name.removesuffix(".real") for name in tensors if name.endswith(".real")]
    return tensors | {name: torch.complex(tensors[f"{name}.real"], tensors[f"{name}.imag"]) for name in names}


def _load_executable(name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Executable:
    backend, code = find_backend(entry["backend"]), entry["code"]
    executables = [backend.load(members[f"{name}/{m}"], c, weights) for m, c in code_members(code).items()]
    if "sizes" not in code:
        return executables[0]
    times = {int(size): float(time) for size, time in code["times"].items()}
    return BatchedExecutable(dict(zip(map(int, code["sizes"]), executables)), code["batched"], times)
