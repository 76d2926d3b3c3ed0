"""Anything a user has -> :class:`Program`.

``torch.export`` (non-strict) gives a graph, :mod:`thresher.frontend.decompositions` brings it to ATen operators, and
:mod:`thresher.frontend.exported_program` makes it a :class:`Program`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import ExportedProgram

from thresher.errors import CaptureError
from thresher.frontend.decompositions import decompose
from thresher.frontend.export import export_module, quiet
from thresher.frontend.exported_program import to_program
from thresher.frontend.layouts import refuse_sparse_inputs
from thresher.frontend.onnx.reader import read_onnx
from thresher.ir.program import Program

#: What can be captured: a module, an exported program, or the path of a ``.pt2`` or ``.onnx`` file.
Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike


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
    refuse_sparse_inputs((args, kwargs or {}))
    attributes: Collection[str] = ()
    if isinstance(model, nn.Module):
        name = type(model).__name__
        exported, attributes = export_module(model, tuple(args), kwargs or {}, dynamic_shapes)
    elif isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError(
                "an exported program has its free sizes already: give dynamic_shapes= to torch.export.export"
            )
        with quiet():
            name, exported = "model", decompose(model)
    else:
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: give an nn.Module, an ExportedProgram, or the path of a .pt2 or .onnx file"
        )
    example_inputs = (tuple(args), kwargs or {}) if args or kwargs else exported.example_inputs
    with quiet():
        return to_program(exported, name, example_inputs or ((), {}), attributes)


def _load_pt2(path: Path) -> ExportedProgram:
    if not path.exists():
        raise CaptureError(f"{path} does not exist")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise CaptureError(f"{path} is not a torch.export file: {error}") from error
