"""Anything a user has -> :class:`Program`.

``torch.export`` (non-strict) gives a graph, :mod:`thresher.frontend.decompositions` brings it to ATen operators, and
:mod:`thresher.frontend.exported_program` makes it a :class:`Program`.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from thresher.errors import CaptureError
from thresher.frontend.decompositions import decompose
from thresher.frontend.exported_program import to_program
from thresher.frontend.onnx.reader import read_onnx
from thresher.ir.program import Program

#: What can be captured: a module, an exported program, or the path of a ``.pt2`` or ``.onnx`` file.
Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike

CURES = """Usual cures:
  * control flow that depends on tensor values: compute both sides and select with torch.where, or move it out of the model;
  * .item(), .tolist(), int(tensor), numpy: keep the value a tensor, or pass it in as a Python number;
  * a shape computed from data (nonzero, boolean indexing): use a mask of fixed shape;
  * an operator without export support: register a fake implementation (torch.library.register_fake)."""
MAX_MESSAGE = 1500  # characters of torch's message


def capture(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture ``model`` as a :class:`Program`; the model itself is left as it is.

    Args:
        model: a module, an ``ExportedProgram``, or the path of a ``.pt2`` or ``.onnx`` file. A module is captured in eval mode; its own
            mode is restored afterwards.
        args, kwargs: example inputs (any nesting). For an exported program they default to the ones stored in it.
        dynamic_shapes: as in ``torch.export.export``, e.g. ``({0: torch.export.Dim("batch")},)``.

    Raises:
        CaptureError: with the line of the user's code and the usual cures.
    """
    if isinstance(model, (str, os.PathLike)):
        model = read_onnx(model) if str(model).endswith(".onnx") else _load_pt2(Path(model))
    if isinstance(model, nn.Module):
        name = type(model).__name__
        exported = _export(model, tuple(args), kwargs or {}, dynamic_shapes)
    elif isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError(
                "an exported program has its free sizes already: give dynamic_shapes= to torch.export.export"
            )
        name, exported = "model", model
    else:
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, an ExportedProgram, or the path of a .pt2 or .onnx file"
        )
    example_inputs = (tuple(args), kwargs or {}) if args or kwargs else exported.example_inputs
    with _quiet():
        return to_program(decompose(exported), name, example_inputs or ((), {}))


def _load_pt2(path: Path) -> ExportedProgram:
    if not path.exists():
        raise CaptureError(f"{path} does not exist")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise CaptureError(f"{path} is not a torch.export file: {error}") from error


def _export(model: nn.Module, args: tuple, kwargs: dict, dynamic_shapes: Any) -> ExportedProgram:
    args, kwargs = _distinct((args, kwargs))
    with eval_mode(model), _quiet():
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise CaptureError(_explain(model, error)) from error


def _distinct(tree: Any) -> Any:
    """Give every leaf its own tensor: torch.export merges two inputs that are one object, silently."""
    return torch.utils._pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, tree)


def _explain(model: nn.Module, error: Exception) -> str:
    message = str(error).strip().split("\n\nThe error above occurred")[0].strip()
    line = _user_frame(error)
    where = f" at {line}" if line else ""
    return f"{type(model).__name__} could not be exported{where}:\n{message[:MAX_MESSAGE]}\n{CURES}"


def _user_frame(error: BaseException) -> str:
    """Return the innermost frame outside torch and thresher: the user's line that stopped the export."""
    libraries = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    frames = [f for f in frames if "contextlib" not in f.filename and not f.filename.startswith("<")]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode for the time of the block, and give every module its own mode back after it."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what says nothing: masks of torch.nn.utils.prune are plain attributes, and export warns about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assigned during export.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
