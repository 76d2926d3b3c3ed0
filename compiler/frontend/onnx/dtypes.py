"""The element types of ONNX in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from thresher.frontend.onnx.values import Unsupported

TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16, TensorProto.BOOL: torch.bool, TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128, TensorProto.INT8: torch.int8, TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64, TensorProto.UINT8: torch.uint8,
    TensorProto.UINT16: torch.uint16, TensorProto.UINT32: torch.uint32, TensorProto.UINT64: torch.uint64,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn, TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2, TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    TensorProto.FLOAT8E8M0: torch.float8_e8m0fnu,
}  # fmt: skip
ELEM_TYPES = {dtype: elem_type for elem_type, dtype in TYPES.items()}
#: Types that torch does not compute with, and the type that holds their numbers here.
HOLDERS: dict[int, torch.dtype] = {
    TensorProto.INT4: torch.int8, TensorProto.INT2: torch.int8, TensorProto.UINT4: torch.uint8, TensorProto.UINT2: torch.uint8,
    TensorProto.FLOAT4E2M1: torch.float32,
}  # fmt: skip
#: The least and the largest number of the integers among them.
NARROW_RANGES: dict[int, tuple[int, int]] = {
    TensorProto.INT4: (-8, 7), TensorProto.INT2: (-2, 1), TensorProto.UINT4: (0, 15), TensorProto.UINT2: (0, 3),
}  # fmt: skip


def torch_dtype(elem_type: int) -> torch.dtype:
    """Return the torch type that holds elements of an ONNX type; raise :class:`Unsupported` for strings."""
    dtype = TYPES.get(elem_type) or HOLDERS.get(elem_type)
    if dtype is None:
        raise Unsupported(f"elements of type {TensorProto.DataType.Name(elem_type)}, which torch does not have")
    return dtype


def tensor_of(proto: TensorProto) -> Tensor:
    """Return the numbers of a ``TensorProto`` as a tensor that owns its memory."""
    dtype = torch_dtype(proto.data_type)
    array = np.array(numpy_helper.to_array(proto))
    if proto.data_type in HOLDERS:
        return torch.from_numpy(array.astype(torch.empty((), dtype=dtype).numpy().dtype))
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    bits = {1: np.uint8, 2: np.int16}[array.dtype.itemsize]  # of ml_dtypes, which torch does not read
    return torch.from_numpy(array.view(bits)).view(dtype)


def dense_of(proto: Any) -> Tensor:
    """Return the numbers of a ``SparseTensorProto``: at linear indices, or at one row of coordinates for each."""
    values, indices = tensor_of(proto.values), tensor_of(proto.indices)
    if indices.dim() == 2:
        strides = torch.tensor([int(np.prod(proto.dims[i + 1 :])) for i in range(len(proto.dims))])
        indices = (indices * strides).sum(1)
    dense = torch.zeros(int(np.prod(proto.dims)), dtype=values.dtype)
    dense[indices] = values
    return dense.reshape(tuple(proto.dims))
