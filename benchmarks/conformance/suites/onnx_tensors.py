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

from thresher.models.families.sample import SampleExcluded

#: Types of ml_dtypes that torch has, too; both keep them in the same bits.
SAME_BITS = {
    "bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz, "float8_e8m0fnu": torch.float8_e8m0fnu,
}  # fmt: skip

REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()
#: Inputs that say how, and not on what, an operator computes: sizes, axes, counts. The tests have them as inputs; they become constants.
SHAPE_LIKE: dict[str, tuple[int, ...]] = {
    **{f"Reduce{name}": (1,) for name in REDUCTIONS},
    **{f"{name}Window": (0,) for name in ("Blackman", "Hamming", "Hann")},
    **{name: (1,) for name in "AffineGrid CenterCropPad CumProd CumSum Expand OneHot Reshape Split SplitToSequence Squeeze".split()},
    **{name: (1,) for name in "Tile TopK Trilu Unsqueeze Upsample".split()},
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "NonMaxSuppression": (2, 3, 4),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (1, 2, 3),
    "STFT": (1, 3),
    "Slice": (1, 2, 3, 4),
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


def shape_like_inputs(graph: onnx.GraphProto) -> set[str]:
    """Return the names of values of a graph that say how its operators compute."""
    return {n.input[i] for n in graph.node for i in SHAPE_LIKE.get(n.op_type, ()) if i < len(n.input) and n.input[i]}


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
