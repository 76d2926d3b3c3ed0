"""A module -> a decomposed ``ExportedProgram``, and what the module changes besides."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, PendingUnbackedSymbolNotFound

from thresher.errors import CaptureError
from thresher.frontend.checking_functions import CheckingFunctions
from thresher.frontend.decompositions import decompose
from thresher.frontend.known_numbers import KnownNumbers
from thresher.frontend.module_state import as_buffers, eval_mode, idle_conversions, plain_tensors, same_attributes
from thresher.frontend.routed_experts import static_experts
from thresher.frontend.side_effects import SideEffects, depends_on_earlier_calls

CURES = """Usual cures:
  * control flow that depends on tensor values: compute both sides and select with torch.where, or move it out of the model;
  * .item(), .tolist(), int(tensor), numpy: keep the value a tensor, or pass it in as a Python number;
  * an argument that decides sizes and is always the same: thresher.compile(..., fixed={"name": value});
  * a shape computed from data (nonzero, boolean indexing): use a mask of fixed shape;
  * an operator without export support: register a fake implementation (torch.library.register_fake)."""
#: torch's errors of functions that look at the values of tensors.
LOOKS_AT_VALUES = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
MAX_MESSAGE = 1500  # characters of torch's message
WRITTEN_CONSTANT = re.compile(r"Constant \S+ is mutated in the forward method")  # torch's words for a plain attribute


def export_module(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, Collection[str]]:
    """Return ``model``, in evaluation mode and for inputs like these, as torch exports and decomposes it, and the names of attributes that
    were taken for buffers: those that hold a tensor which the model writes.

    Raises :class:`CaptureError` where torch cannot, and where the model changes something that the graph would not have.
    """
    args, kwargs = _distinct((args, kwargs))
    with eval_mode(model), quiet():
        try:
            program, effects, numbers = _export(model, args, kwargs, dynamic_shapes)
            attributes = sorted(effects.tensors & _constants(program))
            program = program if attributes else decompose(program)
        except CaptureError as error:
            if not WRITTEN_CONSTANT.search(str(error.__cause__)):
                raise
            attributes = plain_tensors(model)
        if attributes:
            with as_buffers(model, attributes):
                program, effects, numbers = _export(model, args, kwargs, dynamic_shapes)
                program = decompose(program)
        numbers.check(program)
        if effects.others and depends_on_earlier_calls(model, args, kwargs):
            raise CaptureError(
                f"the model changes {', '.join(effects.others[:3])} while it runs, and a call depends on what earlier calls left there; "
                "keep it in a tensor that is a buffer (register_buffer), or pass it in and return it"
            )
    return program, attributes


def _export(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, SideEffects, KnownNumbers]:
    try:
        return _trace(model, args, kwargs, dynamic_shapes, contextlib.nullcontext())
    except CaptureError:
        raise
    except Exception as error:
        if isinstance(error, LOOKS_AT_VALUES):
            with contextlib.suppress(
                Exception
            ):  # it may be another one that looks at values: the first error says which
                return _trace(model, args, kwargs, dynamic_shapes, CheckingFunctions())
        raise CaptureError(_explain(model, error)) from error


def _trace(
    model: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    mode: contextlib.AbstractContextManager[Any],
) -> tuple[ExportedProgram, SideEffects, KnownNumbers]:
    effects = SideEffects()
    with (
        same_attributes(model),
        effects.watching(model),
        static_experts(),
        idle_conversions(),
        mode,
        KnownNumbers(model) as numbers,
    ):
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    return program, effects, numbers


def _constants(program: ExportedProgram) -> set[str]:
    """Return the names of the plain attributes that the program reads."""
    specs = program.graph_signature.input_specs
    return {s.target for s in specs if s.kind is InputKind.CONSTANT_TENSOR and s.target is not None}


def _distinct(tree: Any) -> Any:
    """Give every leaf its own tensor: torch.export merges two inputs that are one object, silently."""
    return torch.utils._pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, tree)


def _explain(model: nn.Module, error: Exception) -> str:
    message = _reason(error) + str(error).strip().split("\n\nThe error above occurred")[0].strip()
    line = _user_frame(error)
    where = f" at {line}" if line else ""
    return f"{type(model).__name__} could not be exported{where}:\n{message[:MAX_MESSAGE]}\n{CURES}"


def _reason(error: Exception) -> str:
    """Return the line that says what torch's error means, where its own words do not."""
    if isinstance(error, DataDependentOutputException):
        return f"{error.func} returns a number or a truth value that the values of tensors decide\n"
    if isinstance(error, DynamicOutputShapeException):
        return f"the sizes of what {error.func} returns depend on the values of tensors\n"
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"it decides something by the values of tensors{_library_frame(error)}\n"
    if isinstance(error, PendingUnbackedSymbolNotFound):
        return "a size that the values of tensors decide is not one of its results\n"
    return ""


def _library_frame(error: BaseException) -> str:
    """Return the innermost line of the functions and modules of torch that run on the way, empty where there is none."""
    folder = os.path.dirname(torch.__file__)
    places = tuple(os.path.join(folder, part) for part in ("nn" + os.sep, "functional.py"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(places)]
    frames = [f for f in frames if os.path.basename(f.filename) != "module.py"]
    return f", in {frames[-1].name} of torch: {frames[-1].line}" if frames else ""


def _user_frame(error: BaseException) -> str:
    """Return the innermost frame outside torch and thresher: the user's line that stopped the export."""
    libraries = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    frames = [f for f in frames if "contextlib" not in f.filename and not f.filename.startswith("<")]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what says nothing: masks of torch.nn.utils.prune are plain attributes, and export warns about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assigned during export.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
