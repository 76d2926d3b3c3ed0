"""``Compiled``: what compile() returns and load() gives back. Called like the model it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from thresher.artifact.writer import save
from thresher.backends.base import Executable
from thresher.report.report import Report
from thresher.runtime.comparison import Check
from thresher.runtime.format import MAIN
from thresher.runtime.reference_run import ReferenceRun
from thresher.runtime.signature import Signature
from thresher.runtime.state import State, call
from thresher.verification.certificate import Certificate


class Compiled:
    """A compiled model. Takes and returns the structure of the original; inputs must have the shapes and dtypes it was built for.

    ``text`` is the rewritten graph in readable form, ``report`` says what was done, ``certificate`` proves what was folded (None unless
    it was asked for, and after loading: it is saved on its own). Calls from several threads are safe.

    A model that writes does so here, too. What it writes into its arguments is in them when the call returns. Its own tensors that it
    writes are copied when it is compiled; ``state`` has them by name, and ``state.reset()`` makes the next call the first one again.
    After ``decode.state = prefill.state`` two models that keep the same tensors share them.
    Results are tensors of their own, also where the model returns a part of what it has written.
    """

    def __init__(
        self,
        signature: Signature,
        executable: Executable,
        report: Report,
        text: str,
        reference_run: ReferenceRun,
        certificate: Certificate | None = None,
    ):
        self.signature, self.executable, self.report, self.text = signature, executable, report, text
        self.reference_run, self.certificate = reference_run, certificate
        with torch.inference_mode(False):  # a tensor that is made in it can be written in it only
            self.state = State(reference_run.state(signature))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self.signature, self.executable.run, self.state, args, kwargs)

    def validate(self) -> list[Check]:
        """Compare the results on the stored inputs with the outputs that the eager model gave when this was built.

        Raises :class:`ValidationError` with the numbers if they differ.
        """
        return [self.reference_run.check(self.signature, self.executable.run)]

    def save(self, path: str | Path) -> Path:
        """Write the artifact: one file that loads without the model's code.

        Raises :class:`ArtifactError` where it cannot be written, :class:`BackendError` where the backend's code cannot be saved.
        """
        return save({MAIN: self}, Path(path))
