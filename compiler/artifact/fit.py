"""The comparison of an artifact with the runtime and the processor that it is loaded on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thresher.backends.tvm.cpu import missing_features
from thresher.errors import ArtifactError
from thresher.runtime.format import code_members, versions


def check_fit(path: Path, manifest: dict[str, Any]) -> None:
    """Raise :class:`ArtifactError` unless the code was built for this TVM and for a processor whose instructions this one has."""
    built, here = manifest["versions"], versions()
    if built["tvm"] != here["tvm"]:
        raise ArtifactError(
            f"{path} was built with TVM {built['tvm']}, here is {here['tvm']}; install that version or build it again"
        )
    if built["machine"] != here["machine"]:
        raise ArtifactError(f"{path} was built for {built['machine']} processors, this is {here['machine']}")
    for cpu in {c.get("cpu", "") for e in manifest["entries"].values() for c in code_members(e["code"]).values()}:
        if missing := missing_features(cpu):
            raise ArtifactError(
                f"{path} was built for the CPU {cpu!r}; this one lacks {', '.join(missing)}: "
                "build it for target 'cpu:x86-64-v3' or on this machine"
            )
