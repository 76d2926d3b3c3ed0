"""Values of ONNX's tests as torch tensors, and inputs of a model as constants."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from ..sample import SampleExcluded

#: Types of ml_dtypes that torch has, too; both keep them in the same bits.
SAME_BITS = {
    "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz, "float8_e8m0fnu": torch.float8_e8m0fnu,
}  # fmt: skip


def as_array(value: Any) -> np.ndarray:
    """Return a value of a test as an array. Raises :class:`SampleExcluded` for strings, sequences and optional values."""
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    if value is None or isinstance(value, list):
        raise SampleExcluded("it has sequences or optional values")
    value = np.asarray(value)
    if value.dtype.kind in "OSUT":
        raise SampleExcluded("it has strings")
    return value


def as_tensor(array: np.ndarray) -> Tensor:
    """Return the array as a tensor of the same bits. Raises :class:`SampleExcluded` where torch has no such type."""
    name = array.dtype.name
    if name in SAME_BITS:
        bits = np.ascontiguousarray(array).view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
        return torch.from_numpy(bits.reshape(array.shape).copy()).view(SAME_BITS[name])
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise SampleExcluded(f"torch has no tensors of {name}") from error


def with_constants(model: onnx.ModelProto, constants: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Return the model with some of its inputs as initialisers."""
    model = copy.deepcopy(model)
    rest = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(rest)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return model


def as_file(model: onnx.ModelProto, name: str) -> Path:
    """Write the model to a file that lasts as long as the process."""
    path = Path(_folder().name) / f"{name}.onnx"
    onnx.save(model, path)
    return path


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="conformance-")
