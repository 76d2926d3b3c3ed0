"""An ``.onnx`` file as a torch module, which is then captured like any other.

    model = read_onnx("model.onnx");  thresher.compile(model, args)      or   thresher.compile("model.onnx", args)

The graph is walked with torch operators (:mod:`thresher.frontend.onnx.evaluator`). Needs ``pip install onnx``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import CaptureError

if TYPE_CHECKING:
    from thresher.frontend.onnx.model import OnnxModel


def read_onnx(path: str | os.PathLike, fixed: Mapping[str, Any] | None = None) -> OnnxModel:
    """Return the model in a file, with its external data.

    ``fixed``: values of inputs that become constants, by name: a sampling rate that branches depend on, a shape.

    Raises :class:`CaptureError` where it is no model, or has operators that are neither known here nor defined by others, naming them.
    """
    try:
        import onnx
    except ImportError as error:
        raise CaptureError(f"reading {path} needs the package onnx: pip install 'thresher[onnx]'") from error
    from thresher.frontend.onnx.model import OnnxModel

    if not Path(path).exists():
        raise CaptureError(f"{path} does not exist")
    try:
        onnx.checker.check_model(str(path))
        proto = onnx.load(str(path))
    except Exception as error:  # of protobuf's, of the checker's
        raise CaptureError(f"{path} is no ONNX model: {str(error)[:500]}") from error
    try:
        return OnnxModel(proto, fixed or {})
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from error
