"""The model that an argument names, and its example inputs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thresher.errors import ThresherError

if TYPE_CHECKING:
    from torch import Tensor


def load_model(spec: str, inputs: Sequence[Tensor], fixed: Mapping[str, float | list[float]]) -> tuple[Any, tuple]:
    """Return the model that ``spec`` names, as :func:`thresher.compile` takes it, and its example inputs.

    Args:
        spec: ``package.module:function``, or the path of a ``.pt2`` or ``.onnx`` file.
        inputs: the example inputs of the command line; where there are none, those that come with the model.
        fixed: inputs of an .onnx file that are always these numbers, by name.

    Raises :class:`ThresherError` where there is no such model, or where nothing describes its inputs.
    """
    if fixed and not spec.endswith(".onnx"):
        raise ThresherError(f"--fixed is for .onnx files; let {spec} return a model with its arguments bound")
    if spec.endswith(".pt2"):
        return spec, tuple(inputs)
    if spec.endswith(".onnx"):
        return _onnx_model(spec, tuple(inputs), fixed)
    if ":" not in spec:
        raise ThresherError(f"cannot read {spec!r}: give package.module:function, or a .pt2 or .onnx file")
    from torch import nn

    model = import_attribute(spec)
    model = model if isinstance(model, nn.Module) else model()
    example: tuple = ()
    if isinstance(model, tuple):
        model, example = model[0], tuple(model[1])
    elif not inputs:
        raise ThresherError(f"{spec} returned a module without example inputs; describe them with --input")
    return model, tuple(inputs) or example


def import_attribute(spec: str) -> Any:
    """Return the attribute that ``package.module:name`` names; modules of the current folder are found, too."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ThresherError(f"cannot import {spec!r}: {error}") from error
    finally:
        sys.path.pop(0)


def _onnx_model(path: str, inputs: tuple, fixed: Mapping[str, float | list[float]]) -> tuple[Any, tuple]:
    from thresher.frontend.onnx.reader import read_onnx

    model = read_onnx(path, fixed)
    example = inputs or model.example()
    if example is None:
        sizes = ", ".join(model.described())
        raise ThresherError(f"{path} leaves sizes open ({sizes}); describe its inputs with --input")
    return model, example
