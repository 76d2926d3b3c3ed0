"""``Compiled``: what compile() returns and load() gives back. Called like the model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thresher.artifact.bundle import MAIN, Bundle
from thresher.backends.base import Executable
from thresher.errors import ValidationError
from thresher.ir.signature import Signature
from thresher.report.data import Check, Report
from thresher.verification.certificate import Certificate
from thresher.verification.compare import EXACT_TOLERANCE, LOWERING_TOLERANCE, compare


@dataclass(frozen=True)
class ReferenceRun:
    """Example inputs (flat) and what the eager model said to them: with these a module proves itself wherever it runs. ``steps``: see
    :func:`thresher.verification.compare.steps`."""

    inputs: list[Any]
    outputs: list[Any]
    steps: float = 0.0


class Compiled:
    """A compiled model. Takes and returns the structure of the original; inputs must have the shapes and dtypes it was built for.

    ``text`` is the rewritten graph in readable form, ``report`` says what was done, ``certificate`` proves what was folded (None unless
    it was asked for, and after loading: it is saved on its own). Calls from several threads are safe.
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
        self.signature, self.executable, self.report, self.text, self.reference_run = (
            signature,
            executable,
            report,
            text,
            reference_run,
        )
        self.certificate = certificate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = self.signature.flatten(args, kwargs)
        return self.signature.assemble(self.executable.run(self.signature.check(leaves)))

    def validate(self) -> list[Check]:
        """Prove it here: the stored probe inputs against the outputs that the eager model gave when this was built.

        Raises :class:`ValidationError` with the numbers if they differ.
        """
        outputs = self.signature.with_literals(self.executable.run(self.signature.check(self.reference_run.inputs)))
        checks = [
            check_outputs(
                "compiled = eager, stored probe", self.reference_run.outputs, outputs, self.reference_run.steps
            )
        ]
        if failed := [c for c in checks if not c.passed]:
            raise ValidationError(
                "; ".join(f"{c.name}: error {c.error:.2e} > {c.tolerance:.0e} {c.detail}" for c in failed)
            )
        return checks

    def save(self, path: str | Path) -> Path:
        """Write the artifact: one file that loads without the model's code."""
        return Bundle({MAIN: self}).save(path)


def check_outputs(name: str, reference: Sequence[Any], candidate: Sequence[Any], steps: float = 0.0) -> Check:
    """Compare flat outputs under the tolerance of their dtypes, or the :func:`thresher.verification.compare.steps` of a model that
    rounds."""
    dtypes = [r.dtype for r in reference if isinstance(r, Tensor)]
    tolerance = max((LOWERING_TOLERANCE.get(d, EXACT_TOLERANCE) for d in dtypes), default=EXACT_TOLERANCE)
    tolerance = max(tolerance, steps)
    found = compare(reference, candidate)
    return Check(name, found.relative, tolerance, not found.exceeds(tolerance), found.reason)
