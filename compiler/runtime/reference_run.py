"""Example inputs and the eager model's outputs on them: with these a compiled model proves itself wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thresher.errors import ValidationError
from thresher.runtime.comparison import Check, Truth, check_outputs
from thresher.runtime.signature import Signature
from thresher.runtime.tensor_spec import is_tensor


@dataclass(frozen=True)
class ReferenceRun:
    """Flat example inputs, the state before the first call among them, and the outputs of the eager model for them.

    Attributes:
        steps: see :func:`thresher.verification.rounding.rounding_allowance`.
        truth: the outputs in float64 and the spread of each, where the model's own rounding is large; None where it is not.
    """

    inputs: list[Any]
    outputs: list[Any]
    steps: float = 0.0
    truth: Truth | None = None

    @staticmethod
    def of(
        inputs: Sequence[Any], outputs: Sequence[Any], steps: float = 0.0, truth: Truth | None = None
    ) -> ReferenceRun:
        """Return a reference run of copies of these torch tensors: the user may write into the originals."""

        def copied(values: Sequence[Any]) -> list[Any]:
            return [v.detach().clone() if is_tensor(v) else v for v in values]

        return ReferenceRun(copied(inputs), copied(outputs), steps, truth)

    def state(self, signature: Signature) -> dict[str, Any]:
        """Return the state before the first call, by name."""
        return dict(zip(signature.state, self.inputs[len(self.inputs) - len(signature.state) :]))

    def check(self, signature: Signature, run: Callable[[Sequence[Any]], list[Any]]) -> Check:
        """Run the inputs here and compare with the outputs.

        Raises :class:`ValidationError` with the numbers if they differ.
        """
        outputs = signature.with_literals(run(signature.check(self.inputs)))
        check = check_outputs("compiled = eager, stored probe", self.outputs, outputs, self.steps, lambda: self.truth)
        if not check.passed:
            raise ValidationError(str(check))
        return check

    # ------------------------------------------------------------------ in an artifact

    def to_json(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the lists for the manifest, which say of each value which tensor or which literal it is, and the tensors by name."""
        lists: dict[str, Any] = {"steps": self.steps}
        tensors: dict[str, Any] = {}
        for side, values in self._sides().items():
            names = [f"{side}.{i}" if is_tensor(v) else None for i, v in enumerate(values)]
            tensors |= {name: v for name, v in zip(names, values) if name}
            lists[side] = [{"tensor": name} if name else {"value": v} for name, v in zip(names, values)]
        return lists, tensors

    @staticmethod
    def from_json(lists: Mapping[str, Any], tensors: Mapping[str, Any]) -> ReferenceRun:
        """Return the reference run of :meth:`to_json`."""
        sides = {
            side: [tensors[v["tensor"]] if "tensor" in v else v["value"] for v in lists[side]]
            for side in ("inputs", "outputs", "truth", "spread")
            if side in lists
        }
        truth = Truth(sides["truth"], sides["spread"]) if "truth" in sides else None
        return ReferenceRun(sides["inputs"], sides["outputs"], float(lists["steps"]), truth)

    def _sides(self) -> dict[str, Sequence[Any]]:
        sides: dict[str, Sequence[Any]] = {"inputs": self.inputs, "outputs": self.outputs}
        return sides if self.truth is None else {**sides, "truth": self.truth.outputs, "spread": self.truth.spread}
