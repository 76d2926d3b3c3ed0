"""The one comparison of outputs, and the tolerances of their dtypes: for compiled results, and for programs in float64.

Every error is relative to the scale of the reference output (its largest finite magnitude), so that one number means the same for logits
and for probabilities. NaN and infinities must be at the same indices.

Where two results differ by more than their dtype allows, rounding may be the reason. The model in float64 is the judge (:class:`Truth`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from thresher.runtime.tensor_spec import dtype_name, is_tensor

EXACT_TOLERANCE = 1e-9
#: The largest relative error of compiled code, by the dtype of the output. Other dtypes (integers, booleans) must be exact.
TOLERANCE = {
    "float64": 1e-9, "complex128": 1e-9, "float32": 1e-4, "complex64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1,
}  # fmt: skip
#: An element may be so many times as far from the truth as the worst run of the model in torch. Torch is now and then right by accident in
#: all runs, and our kernels add in another order. Measured where outputs exceed their tolerance, over 24 runs: at most 6.3 in a chaotic
#: model (8,192 elements, all wrong in float32), 5.6 in float16, 2.6 where large numbers cancel, 1.0 with subnormal numbers.
ROUNDING_FACTOR = 8


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
    """One comparison that was made, or that could not be made.

    Attributes:
        error: relative to the scale of the reference output, of the output that comes nearest to its ``tolerance`` or exceeds it.
        detail: the reason why the two cannot be compared, or what the truth says of an error over the tolerance.
        ours, eager: the errors of the candidate and of the reference against the model in float64, relative to the scale of the output;
            None where that was not asked.
        skipped: the reason why the comparison was not made; then the numbers mean nothing.
    """

    name: str
    error: float
    tolerance: float
    passed: bool
    detail: str = ""
    ours: float | None = None
    eager: float | None = None
    skipped: str = ""

    @staticmethod
    def not_made(name: str, reason: str) -> Check:
        """Return a check that could not be made; it does not fail."""
        return Check(name, 0.0, 0.0, True, skipped=reason)

    @property
    def excused(self) -> bool:
        """True where the error exceeds the tolerance, and rounding explains it."""
        return self.passed and self.ours is not None

    def __str__(self) -> str:
        """Return one line with all numbers."""
        if self.skipped:
            return f"{self.name}: not made: {self.skipped}"
        line = f"{self.name}: error {self.error:.2e}, allowed {self.tolerance:.0e}"
        if self.ours is not None and self.eager is not None:
            line += f"; against float64: {self.ours:.2e}, of the reference {self.eager:.2e}"
        return f"{line} {self.detail}".rstrip()


class Truth:
    """The model in float64, and how far rounding moves each element of its outputs in the dtypes that the model has.

    Attributes:
        outputs: the flat outputs in float64; literals as they are.
        spread: for each output the absolute error of each element, the largest of a few runs; infinity where a run overflowed.
    """

    def __init__(self, outputs: Sequence[Any], spread: Sequence[Any]):
        self.outputs, self.spread = outputs, spread

    def widen(self) -> bool:
        """Add another run to the spread; return False where there are no more."""
        return False

    def explains(self, index: int, reference: Any, value: Any, tolerance: float) -> bool:
        """Return True if every element of ``value``, as output ``index``, is as near to the truth as rounding allows.

        That is ``tolerance`` of the output's scale, or ROUNDING_FACTOR times the element's spread. What is not finite must be so in the
        truth; or in the reference, if a run of the model overflowed there, too.
        """
        truth, value, reference = (_widened(v) for v in (self.outputs[index], value, reference))
        spread = np.asarray(_widened(self.spread[index]).real)
        if not truth.shape == value.shape == reference.shape == spread.shape:
            return False
        overflows = ~np.isfinite(spread)
        with np.errstate(invalid="ignore"):
            allowed = np.maximum(tolerance * _scale(truth), np.where(overflows, 0.0, ROUNDING_FACTOR * spread))
            near = np.isfinite(value) & np.isfinite(truth) & (np.abs(value - truth) <= allowed)
        finite = np.isfinite(value)
        same = ~finite & _same_kind(value, truth)
        overflowed = ~finite & overflows & _same_kind(value, reference)
        return bool((near | same | overflowed).all())

    def error(self, index: int, value: Any) -> float:
        """Return the error of ``value``, as output ``index``, relative to the scale of the truth."""
        return compare([self.outputs[index]], [value]).relative


def tolerance_of(value: Any) -> float:
    """Return the tolerance of a tensor's dtype."""
    return TOLERANCE.get(dtype_name(value.dtype), EXACT_TOLERANCE)


def compare(reference: Sequence[Any], candidate: Sequence[Any]) -> Divergence:
    """Return the :class:`Divergence` of two lists of outputs: NumPy arrays, torch tensors, or literals that must be equal."""
    if len(reference) != len(candidate):
        return Divergence(np.inf, np.inf, 0, f"{len(reference)} outputs against {len(candidate)}")
    worst = Divergence(0.0, 0.0)
    for index, (a, b) in enumerate(zip(reference, candidate)):
        divergence = _compare_outputs(a, b, index)
        if divergence.reason:
            return divergence
        if not divergence.relative <= worst.relative:
            worst = divergence
    return worst


def check_outputs(
    name: str,
    reference: Sequence[Any],
    candidate: Sequence[Any],
    steps: float = 0.0,
    truth: Callable[[], Truth | None] = lambda: None,
) -> Check:
    """Compare flat outputs of compiled code with their reference, each by the tolerance of its dtype.

    ``steps`` is the error that rounding to whole numbers may make in a quantised model, if that is larger
    (:func:`thresher.verification.rounding.rounding_allowance`). An output that exceeds its tolerance passes all the same where the truth
    explains every element of it, and of the reference: a reference that it does not explain is not the model that it was made of.
    ``truth`` is asked only then.
    """
    if len(reference) != len(candidate):
        return Check(name, np.inf, EXACT_TOLERANCE, False, compare(reference, candidate).reason)
    checks = [_check_output(name, i, reference[i], candidate[i], steps, truth) for i in range(len(reference))]
    return max(checks, key=_severity, default=Check(name, 0.0, EXACT_TOLERANCE, True))


def _severity(check: Check) -> tuple[bool, bool, float]:
    return not check.passed, check.excused, check.error / check.tolerance


def _check_output(
    name: str, index: int, reference: Any, candidate: Any, steps: float, truth: Callable[[], Truth | None]
) -> Check:
    tolerance = EXACT_TOLERANCE
    if (
        type(reference) is float and type(candidate) is float
    ):  # what item() read of a tensor; of which dtype is not known here
        reference, candidate = np.asarray(reference, "float32"), np.asarray(candidate, "float32")
    if is_tensor(reference) and is_tensor(candidate):
        dtype = dtype_name(reference.dtype)
        if (other := dtype_name(candidate.dtype)) != dtype:
            return Check(name, np.inf, tolerance, False, f"output {index} is {other} instead of {dtype}")
        tolerance = max(tolerance_of(reference), steps)
    divergence = _compare_outputs(reference, candidate, index)
    check = Check(name, divergence.relative, tolerance, not divergence.exceeds(tolerance), divergence.reason)
    comparable = is_tensor(reference) and is_tensor(candidate) and tuple(reference.shape) == tuple(candidate.shape)
    judge = truth() if comparable and not check.passed else None
    return check if judge is None else _judge(check, index, reference, candidate, judge)


def _judge(check: Check, index: int, reference: Any, candidate: Any, truth: Truth) -> Check:
    """Return ``check``, whose error is too large, as the truth has it."""
    check.ours, check.eager = truth.error(index, candidate), truth.error(index, reference)
    for value, subject in ((candidate, "the result"), (reference, "the reference")):
        while not truth.explains(index, reference, value, check.tolerance):
            if not truth.widen():
                check.detail = f"{check.detail} rounding does not explain {subject} (output {index})".lstrip()
                return check
    check.passed, check.detail = True, "rounding explains it"
    return check


def _compare_outputs(reference: Any, candidate: Any, index: int) -> Divergence:
    if is_tensor(reference) and is_tensor(candidate):
        return _compare_tensors(reference, candidate, index)
    return _compare_literals(reference, candidate, index)


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
        if not _same_kind(a[~finite], b[~finite]).all():
            return Divergence(np.inf, np.inf, index, "NaN or infinities of another sign")
        a, b = a[finite], b[finite]
    absolute, scale = float(np.abs(a - b).max(initial=0.0)), _scale(a)
    relative = absolute / scale if scale > 0 else absolute
    if _are_other_integers(reference, candidate):  # however large they are: float64 may not tell them apart
        absolute, relative = max(absolute, 1.0), max(relative, 2 * EXACT_TOLERANCE)
    return Divergence(relative, absolute, index)


def _are_other_integers(a: Any, b: Any) -> bool:
    """Return True for integers that differ."""
    if not all(dtype_name(v.dtype).startswith(("int", "uint")) for v in (a, b)):
        return False
    x, y = (v if isinstance(v, np.ndarray) else v.detach().cpu().numpy() for v in (a, b))
    return not np.array_equal(x, y)


def _scale(values: np.ndarray) -> float:
    """Return the largest finite magnitude; 0 where there is none."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _widened(value: Any) -> np.ndarray:
    """Return the numbers in float64, or in complex128 where they are complex."""
    if isinstance(value, np.ndarray):
        return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64, copy=False)
    value = value.detach().cpu()
    return (value.cdouble().resolve_conj() if value.is_complex() else value.double()).resolve_neg().numpy()


def _same_kind(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where both are NaN, or the same infinity, in each part of a complex number, or both are finite."""
    same = np.ones(a.shape, dtype=bool)
    for x, y in ((a.real, b.real), (a.imag, b.imag)):
        kinds = (np.nan_to_num(v, nan=0.5, posinf=1.0, neginf=-1.0) * ~np.isfinite(v) for v in (x, y))
        same &= np.equal(*kinds)
    return same
