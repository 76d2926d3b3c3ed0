"""The converters of TVM that are right: which of them may be used for a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from thresher.backends.tvm.importing.values import is_empty, tensors_of
from thresher.ir.nodes import dtype_of

aten = torch.ops.aten

#: Operators that TVM gets wrong for some arguments without an error: floats of eight bits, the order of equal elements, other weights, no
#: running statistics, other strides than those of the memory, norms that are summed in half types; the others pass over a NaN.
DISTRUSTED: frozenset[Any] = frozenset(
    {
        aten._to_copy.default, aten.sort.default, aten.argsort.default, aten.topk.default, aten._upsample_bilinear2d_aa.default,
        aten._native_batch_norm_legit_functional.default, aten.as_strided.default, aten.clamp.Tensor,
        aten.linalg_vector_norm.default,
        aten.median.default, aten.median.dim, aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
        aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default,
    }
)  # fmt: skip
#: Operators that TVM gets right for floats alone: it rounds the means of whole numbers in another way.
OF_FLOATS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)


def is_trusted(node: fx.Node) -> bool:
    """Return whether TVM's own converter may be used: not for complex numbers, nor for tensors without elements."""
    values = [v for n in (node, *node.all_input_nodes) for v in tensors_of(n.meta.get("val"))]
    if node.target in OF_FLOATS and not dtype_of(node).is_floating_point:
        return False
    return node.target not in DISTRUSTED and not any(v.is_complex() or is_empty(v) for v in values)
