"""The one comparison of outputs, and the tolerances of their dtypes: for compiled results, and for programs in float64.

Every error is relative to the scale of the reference output (its largest finite magnitude), so that one number means the same for logits
and for probabilities. NaN and infinities must be at the same indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.runtime.tensor_spec import dtype_name, is_tensor

EXACT_TOLERANCE = 1e-9
#: The largest relative error of compiled code, by the dtype of the output. Other dtypes (integers, booleans) must be exact.
TOLERANCE = {
    "float64": 1e-9, "complex128": 1e-9, "float32": 1e-4, "complex64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1,
}  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """The distance of a candidate from its reference, over all outputs: the worst error relative to the output's scale."""

    relative: float
    absolute: float
    output: int = 0  # index of the worst output
    reason: str = ""  # set where the two cannot be compared at all

    def exceeds(self, tolerance: float) -> bool:
        """Return True unless the outputs are comparable and the relative error is at most ``tolerance``."""
        return bool(self.reason) or not self.relative <= tolerance


@dataclass
class Check:
    """One comparison that was made: ``error`` is relative to the scale of the reference output."""

    name: str
    error: float
    tolerance: float
    passed: bool
    detail: str = ""


def compare(reference: Sequence[Any], candidate: Sequence[Any]) -> Divergence:
    """Return the :class:`Divergence` of two lists of outputs: NumPy arrays, torch tensors, or literals that must be equal."""
    if len(reference) != len(candidate):
        return Divergence(np.inf, np.inf, 0, f"{len(reference)} outputs against {len(candidate)}")
    worst = Divergence(0.0, 0.0)
    for index, (a, b) in enumerate(zip(reference, candidate)):
        divergence = _compare_tensors(a, b, index) if is_tensor(a) and is_tensor(b) else _compare_literals(a, b, index)
        if divergence.reason:
            return divergence
        if not divergence.relative <= worst.relative:
            worst = divergence
    return worst


def check_outputs(name: str, reference: Sequence[Any], candidate: Sequence[Any], steps: float = 0.0) -> Check:
    """Compare flat outputs of compiled code with their reference.

    The tolerance is the largest one of the reference's dtypes, or ``steps`` where that is larger: the error that rounding to whole
    numbers may make in a quantised model (:func:`thresher.verification.rounding.rounding_allowance`).
    """
    tolerances = [TOLERANCE.get(dtype_name(r.dtype), EXACT_TOLERANCE) for r in reference if is_tensor(r)]
    tolerance = max([*tolerances, EXACT_TOLERANCE, steps])
    divergence = compare(reference, candidate)
    return Check(name, divergence.relative, tolerance, not divergence.exceeds(tolerance), divergence.reason)


def _compare_literals(reference: Any, candidate: Any, index: int) -> Divergence:
    if type(reference) is type(candidate) and (
        reference == candidate or (reference != reference and candidate != candidate)
    ):
        return Divergence(0.0, 0.0, index)
    return Divergence(np.inf, np.inf, index, f"{reference!r} != {candidate!r}")


def _compare_tensors(reference: Any, candidate: Any, index: int) -> Divergence:
    if tuple(reference.shape) != tuple(candidate.shape):
        reason = f"shape {tuple(reference.shape)} != {tuple(candidate.shape)}"
        return Divergence(np.inf, np.inf, index, reason)
    a, b = _widened(reference), _widened(candidate)
    finite = np.isfinite(a)
    if not finite.all() or not np.isfinite(b).all():
        if not np.array_equal(finite, np.isfinite(b)):
            return Divergence(np.inf, np.inf, index, "NaN or infinity in different places")
        if not np.array_equal(_kinds(a[~finite]), _kinds(b[~finite])):
            return Divergence(np.inf, np.inf, index, "NaN or infinities of another sign")
        a, b = a[finite], b[finite]
    absolute, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(a).max(initial=0.0))
    return Divergence(absolute / scale if scale > 0 else absolute, absolute, index)


def _widened(value: Any) -> np.ndarray:
    """Return the numbers in float64, or in complex128 where they are complex."""
    if isinstance(value, np.ndarray):
        return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64, copy=False)
    value = value.detach().cpu()
    return (value.cdouble().resolve_conj() if value.is_complex() else value.double()).resolve_neg().numpy()


def _kinds(values: np.ndarray) -> np.ndarray:
    """Return numbers that tell NaN and the two infinities apart."""
    parts = np.stack([values.real, values.imag]) if np.iscomplexobj(values) else values
    return np.nan_to_num(parts, nan=0.0, posinf=1.0, neginf=-1.0)
