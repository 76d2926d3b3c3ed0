"""The types of a program's values in Relax, and the check that what a converter returned has them.

A complex tensor [..] is a real one [.., 2] there, (real, imaginary): TVM has no complex numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tvm import relax

from thresher.backends.tvm.importing.sizes import SYMBOLIC, Sizes
from thresher.runtime.tensor_spec import dtype_name

#: The dtype of the parts of a complex number.
PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


def tensor_type(value: Tensor, sizes: Sizes) -> relax.TensorType:
    """Return the type in Relax of a fake tensor. Raises :class:`KeyError` for a size that is not known yet."""
    shape = [sizes.expression(d) for d in value.shape]
    return relax.TensorType([*shape, 2] if value.is_complex() else shape, stored_dtype(value.dtype))


def rank_type(value: Tensor) -> relax.TensorType:
    """Return the type in Relax of a fake tensor whose sizes are not known before it is computed."""
    return relax.TensorType(dtype=stored_dtype(value.dtype), ndim=value.dim() + value.is_complex())


def is_eight_bit_float(value: Any) -> bool:
    """Return whether a fake tensor is of a floating type of eight bits: TVM moves such numbers, and converts them wrongly."""
    return isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize == 1


def stored_dtype(dtype: torch.dtype) -> str:
    """Return the name of the dtype in which values of ``dtype`` are held."""
    return dtype_name(PARTS.get(dtype, dtype))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the fake tensors of a node's value: one, or those of a list."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def is_empty(value: Any) -> bool:
    """Return whether a fake tensor has no element, for whatever its free sizes are."""
    return isinstance(value, Tensor) and any(isinstance(d, int) and d == 0 for d in value.shape)


def misfit(expression: Any, value: Any, known: Sizes) -> str:
    """Return the reason why ``expression`` is not a value of the kind that the node declares; empty where it is.

    Sizes are compared where they are numbers, or would be if the ``known`` free sizes were.
    """
    if isinstance(value, (tuple, list)):
        parts = _parts(expression)
        if parts is None or len(parts) != len(value):
            return f"{len(value)} results were expected"
        # a result without elements is one that the operator leaves out: the statistics of a batch norm that takes none
        return next(filter(None, (misfit(p, v, known) for p, v in zip(parts, value) if not is_empty(v))), "")
    if value is None or isinstance(value, SYMBOLIC) or not isinstance(value, Tensor):
        return ""
    kind = expression if isinstance(expression, relax.TensorType) else getattr(expression, "ty", None)
    if not isinstance(kind, relax.TensorType):
        return f"it gives {type(expression).__name__}, which is no tensor"
    if str(kind.dtype) != stored_dtype(value.dtype):
        return f"it gives {kind.dtype} instead of {dtype_name(value.dtype)}"
    if kind.ndim not in (-1, value.dim() + value.is_complex()):
        return f"it gives {kind.ndim} dimensions instead of {value.dim()}"
    sizes = list(kind.shape.values) if isinstance(kind.shape, relax.ShapeExpr) else []
    for actual, expected in zip(sizes, value.shape):
        if known.differ(actual, expected):
            return f"it gives the shape {[str(s) for s in sizes]} instead of {[str(d) for d in value.shape]}"
    return ""


def _parts(expression: Any) -> Sequence[Any] | None:
    if isinstance(expression, (tuple, list)):
        return expression
    if isinstance(expression, relax.Tuple):
        return list(expression.fields)
    kind = getattr(expression, "ty", None)
    return list(kind.fields) if isinstance(kind, relax.TupleType) else None
