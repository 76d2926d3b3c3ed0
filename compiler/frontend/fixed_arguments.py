"""Arguments that are the same in every call: they become constants of the captured model, and a call leaves them out.

Some decide sizes, or how often a loop runs: the grid of patches of a vision model, a sampling rate. As inputs they could have any value,
and a graph has one form.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from thresher.errors import InputError
from thresher.frontend.capture import Model
from thresher.frontend.onnx.reader import read_onnx


def fix_arguments(model: Model, fixed: Mapping[str, Any]) -> Model:
    """Return ``model`` without the arguments that ``fixed`` names: those of ``forward``, or inputs of an .onnx file.

    A module comes back as another one that shares its parameters, buffers and submodules; names of parameters stay what they are.

    Args:
        model: what :func:`thresher.capture` takes.
        fixed: their values by name: of any type that ``forward`` takes; for an .onnx file numbers, or tensors.

    Raises :class:`InputError` for a name that ``forward`` does not have, and for a model that no longer has arguments with names;
    :class:`CaptureError` for an input that an .onnx file does not have.
    """
    if not fixed:
        return model
    if isinstance(model, (str, os.PathLike)) and str(model).endswith(".onnx"):
        return read_onnx(model, fixed)
    if not isinstance(model, nn.Module):
        raise InputError("fixed= needs an nn.Module or an .onnx file: bind the values before torch.export.export")
    return _bound(model, dict(fixed))


def _bound(model: nn.Module, fixed: dict[str, Any]) -> nn.Module:
    whole, bound = inspect.signature(model.forward), copy.copy(model)
    patched = vars(bound).pop("forward", None)  # of the module alone, as libraries set it that wrap a model
    forward = type(model).forward if patched is None else lambda self, *args, **kwargs: patched(*args, **kwargs)
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in whole.parameters.values())
    if not variadic and (unknown := sorted(fixed.keys() - whole.parameters.keys())):
        raise InputError(f"fixed: forward has no argument {unknown[0]!r}; it has {', '.join(whole.parameters)}")
    remaining = whole.replace(parameters=[p for name, p in whole.parameters.items() if name not in fixed])
    named = {name: value for name, value in fixed.items() if name in whole.parameters}
    others = {name: value for name, value in fixed.items() if name not in whole.parameters}

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = remaining.bind(*args, **kwargs).arguments
        both = inspect.BoundArguments(whole, {**arguments, **named})
        return forward(self, *both.args, **both.kwargs, **others)

    call.__signature__ = _method(remaining)  # type: ignore[attr-defined]
    # a class of its own and not an attribute: deep copies of the module then run their own parameters
    bound.__class__ = type(type(model).__name__, (type(model),), {"forward": call})
    return bound


def _method(signature: inspect.Signature) -> inspect.Signature:
    """Return the signature with ``self``."""
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return inspect.Signature([first, *signature.parameters.values()])
