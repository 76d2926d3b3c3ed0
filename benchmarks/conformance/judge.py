"""One case -> one verdict: compile with validation, call, and compare with eager torch by rules of this file alone.

The comparison is not the compiler's: a defect in ``thresher.runtime.comparison`` must not hide itself. Integers and booleans are equal
exactly; floats to a fraction of the output's scale; NaN and infinities are at the same indices; shapes, dtypes and the structure are the
same; and what eager leaves in the inputs that it writes into, the compiled model leaves there, too.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import thresher
from thresher.models.families.sample import Case, Inputs, SampleExcluded

#: Every outcome, as it is called on the page.
OUTCOMES = {
    "equal": "equal",
    "library": "through torch's kernel",
    "refused": "refused",
    "invalid": "fails validation",
    "wrong": "wrong",
    "crashed": "crashed",
    "random": "random",
    "eager": "eager fails",
    "excluded": "apart",
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: Ours may be this many times as far from the model in float64 as eager itself is.
EAGER_ERRORS = 4.0
SECONDS_OF_TIMING = 0.1

Compile = Callable[..., Any]


@dataclass
class Verdict:
    """The outcome of a sample, a key of :data:`OUTCOMES`; ``reason`` says why it is not equal.

    ``library`` names the nodes that torch's own kernels compute; times are seconds of the build and milliseconds of a call.
    """

    outcome: str
    reason: str = ""
    library: list[str] = field(default_factory=list)
    build_seconds: float | None = None
    milliseconds: float | None = None
    eager_milliseconds: float | None = None


class _EagerFails(Exception):
    """The model itself raises."""


class _Random(Exception):
    """Two runs of the model differ."""


def judge(build: Callable[[], Case], compile_model: Compile = thresher.compile) -> Verdict:
    """Return the verdict on the case that ``build`` makes. Only what ends the process ends this function."""
    try:
        with torch.no_grad():
            case = build()
            references = [_reference(case, inputs) for inputs in (case.inputs, *case.others)]
    except SampleExcluded as why:
        return Verdict("excluded", str(why))
    except _Random as why:
        return Verdict("random", str(why))
    except Exception as error:
        return Verdict("eager", _one_line(error))
    try:
        with torch.no_grad():
            return _judge_compiled(case, references, compile_model)
    except thresher.ThresherError as error:
        invalid = type(error).__name__ == "ValidationError"
        return Verdict("invalid" if invalid else "refused", reason_of(error))
    except Exception as error:
        return Verdict("crashed", _one_line(error))


def _judge_compiled(case: Case, references: list[_Call], compile_model: Compile) -> Verdict:
    start = time.perf_counter()
    example = _copy(case.inputs)
    compiled = compile_model(case.model, example.args, example.kwargs, validate="error", progress=False)
    seconds = time.perf_counter() - start
    library = list(compiled.report.library)
    verdict = Verdict("library" if library else "equal", library=library, build_seconds=round(seconds, 3))
    for number, (inputs, reference) in enumerate(zip((case.inputs, *case.others), references)):
        difference = _difference(case, inputs, reference, _call(compiled, inputs))
        if difference:
            verdict.outcome, verdict.reason = "wrong", f"{'other inputs: ' if number else ''}{difference}"
            return verdict
    verdict.milliseconds = _milliseconds(compiled, case.inputs)
    if isinstance(case.model, nn.Module):
        verdict.eager_milliseconds = _milliseconds(case.model, case.inputs)
    return verdict


# ---------------------------------------------------------------------- calls


@dataclass(frozen=True)
class _Call:
    """The result of a call: its leaves, its structure (None: not compared), and the tensors given to it as they are afterwards."""

    leaves: list[Any]
    structure: Any
    inputs: list[Tensor]


def _copy(inputs: Inputs) -> Inputs:
    """Give every call tensors of its own, with the strides of the sample's."""

    def cloned(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(cloned, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs, inputs.expected)


def _call(model: Callable[..., Any], inputs: Inputs) -> _Call:
    arguments = _copy(inputs)
    leaves, structure = pytree.tree_flatten(model(*arguments.args, **arguments.kwargs))
    tensors = [t for t in pytree.tree_leaves((arguments.args, arguments.kwargs)) if isinstance(t, Tensor)]
    return _Call([t.detach() if isinstance(t, Tensor) else t for t in leaves], structure, tensors)


def _reference(case: Case, inputs: Inputs) -> _Call:
    """Run eager torch twice: with other seeds, whatever the model seeds itself, and with other values in memory that nobody has written."""
    if inputs.expected is not None:
        return _Call(inputs.expected, None, [])
    assert isinstance(case.model, nn.Module)
    case.model.eval()
    first = _seeded_call(case.model, inputs, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        second = _seeded_call(case.model, inputs, 2)
    finally:
        torch.use_deterministic_algorithms(False)
    if difference := _differ(first, second, 0.0):
        raise _Random(f"two runs of eager torch differ: {difference}")
    return first


def _seeded_call(model: nn.Module, inputs: Inputs, seed: int) -> _Call:
    """Run the model with this seed, also where it sets one itself."""
    torch.manual_seed(seed)
    with mock.patch.object(torch, "manual_seed"):
        return _call(model, inputs)


def _milliseconds(model: Callable[..., Any], inputs: Inputs) -> float:
    """Return the median time of a call. Where the model writes into its inputs, it reads them again: no result is looked at here."""
    arguments, times = _copy(inputs), []
    while not times or (sum(times) < SECONDS_OF_TIMING and len(times) < 20):
        start = time.perf_counter()
        model(*arguments.args, **arguments.kwargs)
        times.append(time.perf_counter() - start)
    return round(median(times) * 1e3, 4)


# ---------------------------------------------------------------------- comparing


def _difference(case: Case, inputs: Inputs, reference: _Call, call: _Call) -> str:
    """Return how the two calls differ; "" where they do not, or where eager itself is about as far from the truth as we are."""
    difference = _differ(reference, call, case.tolerance)
    if not difference or not isinstance(case.model, nn.Module):
        return difference
    try:
        truth = _call(copy.deepcopy(case.model).double(), _in_float64(inputs))
    except Exception:
        return difference  # not every model runs in float64
    return "" if _as_good_as_eager(truth, reference, call) else difference


def _in_float64(inputs: Inputs) -> Inputs:
    def widened(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = pytree.tree_map(widened, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs)


def _differ(reference: _Call, call: _Call, tolerance: float) -> str:
    if len(reference.leaves) != len(call.leaves):
        return f"{len(call.leaves)} outputs instead of {len(reference.leaves)}"
    for index, (expected, actual) in enumerate(zip(reference.leaves, call.leaves)):
        if difference := leaf_difference(expected, actual, tolerance):
            return f"output {index}: {difference}"
    if reference.structure is not None and reference.structure != call.structure:
        return f"structure {call.structure} instead of {reference.structure}"
    for index, (expected, actual) in enumerate(zip(reference.inputs, call.inputs)):
        if difference := leaf_difference(expected, actual, tolerance):
            return f"input {index} after the call: {difference}"
    return ""


def leaf_difference(expected: Any, actual: Any, tolerance: float = 0.0) -> str:
    """Return how one output differs from the one that is expected, "" where it is equal.

    Args:
        expected, actual: torch tensors, NumPy arrays or plain values.
        tolerance: the largest error of floats relative to the scale of ``expected``, where that of their dtype is smaller.
    """
    expected, actual = _as_tensor(expected), _as_tensor(actual)
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = type(expected) is type(actual) and (expected == actual or (expected != expected and actual != actual))
        return "" if same else f"{actual!r} instead of {expected!r}"
    if expected.dtype != actual.dtype:
        return f"dtype {actual.dtype} instead of {expected.dtype}"
    if expected.shape != actual.shape:
        return f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if expected.layout != actual.layout:
        return f"layout {actual.layout} instead of {expected.layout}"
    a, b = _numbers(expected), _numbers(actual)
    if not (expected.is_floating_point() or expected.is_complex()):
        wrong = int((a != b).sum())
        return f"{wrong} of {a.size} values differ" if wrong else ""
    for test, name in ((np.isnan, "NaN"), (np.isposinf, "infinity"), (np.isneginf, "minus infinity")):
        if not all(np.array_equal(test(p), test(q)) for p, q in zip(_parts(a), _parts(b))):
            return f"{name} in other places"
    error, bound = relative_error(a, b), max(tolerance, _tolerance(expected.dtype))
    return "" if error <= bound else f"error {error:.1e} of the scale (bound {bound:.0e})"


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference of the finite values, relative to the largest finite magnitude of ``a``."""
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    absolute, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(a).max(initial=0.0))
    return absolute / scale if scale > 0 else absolute


def _as_good_as_eager(truth: _Call, reference: _Call, call: _Call) -> bool:
    """Return whether no float output is more than a few times as far from the model in float64 as eager's."""
    if not len(truth.leaves) == len(reference.leaves) == len(call.leaves) or reference.structure != call.structure:
        return False
    pairs = zip([*truth.leaves, *truth.inputs], [*reference.leaves, *reference.inputs], [*call.leaves, *call.inputs])
    for exact, eager, ours in pairs:
        if not leaf_difference(eager, ours):
            continue
        if not (isinstance(eager, Tensor) and isinstance(ours, Tensor) and eager.is_floating_point()):
            return False
        if eager.shape != ours.shape or eager.dtype != ours.dtype or exact.shape != ours.shape:
            return False
        e, a, b = _numbers(exact), _numbers(eager), _numbers(ours)
        if not np.array_equal(np.isfinite(e), np.isfinite(b)) or not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return False
        if relative_error(e, b) > EAGER_ERRORS * relative_error(e, a):
            return False
    return True


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray | np.generic) else value


def _numbers(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    value = value.to_dense() if value.layout != torch.strided else value
    value = value.resolve_conj().resolve_neg()
    if value.is_complex():
        return value.cdouble().numpy()
    if value.is_floating_point():
        return value.double().numpy()
    return value.dequantize().double().numpy() if value.is_quantized else value.numpy()


def _parts(values: np.ndarray) -> tuple[np.ndarray, ...]:
    return (values.real, values.imag) if np.iscomplexobj(values) else (values,)


def _tolerance(dtype: torch.dtype) -> float:
    real = dtype.to_real() if dtype.is_complex else dtype
    return TOLERANCE.get(real, 1e-2)  # what is left has eight bits: exact, or very nearly so


# ---------------------------------------------------------------------- reasons


def reason_of(error: thresher.ThresherError) -> str:
    """Return the class of an error of ours and the line of its message that says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if "could not be exported" in first and len(lines) > 1:
        first = lines[1]  # the first line has only the module and the line of its code
    first = re.sub(r' at File ".*?", line \d+, in \w+', "", first)  # the module is one of ours, and has one line
    return f"{type(error).__name__}: {first[:300]}"


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
