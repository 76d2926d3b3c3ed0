"""Image operators on channels-last tensors, ``[N, H, W, C]``: what the CPU backend has kernels for.

Each is its ATen namesake between two permutations; weights keep ATen's layout and are packed by the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _define(name: str, schema: str, reference: Callable[..., Tensor]) -> None:
    """An operator whose reference runs on any device, under autograd and on fake tensors (it is a composition)."""
    torch.library.define(f"thresher::{name}", f"{schema} -> Tensor")
    torch.library.impl(f"thresher::{name}", "CompositeImplicitAutograd")(reference)


def _first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous()


def _namesake(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An ATen operator as one on channels-last tensors."""

    def reference(x: Tensor, *rest: Any) -> Tensor:
        return _last(call(_first(x), *rest))

    return reference


CONV = "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
TRANSPOSED = CONV.replace("int[] dilation, int groups", "int[] output_padding, int groups, int[] dilation")
MAX_POOL = "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode)"
AVG_POOL = "(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor)"

for name, schema, call in (
    ("conv2d_nhwc", CONV, aten.conv2d.default),
    ("conv3d_ndhwc", CONV, aten.conv3d.default),
    ("conv_transpose2d_nhwc", TRANSPOSED, aten.conv_transpose2d.input),
    ("conv_transpose3d_ndhwc", TRANSPOSED, aten.conv_transpose3d.input),
    ("max_pool2d_nhwc", MAX_POOL, aten.max_pool2d.default),
    ("max_pool3d_ndhwc", MAX_POOL, aten.max_pool3d.default),
    ("avg_pool2d_nhwc", AVG_POOL, aten.avg_pool2d.default),
    ("avg_pool3d_ndhwc", AVG_POOL, aten.avg_pool3d.default),
    ("upsample_nearest2d_nhwc", "(Tensor x, int[]? size, float[]? factors)", aten.upsample_nearest2d.vec),
    (
        "upsample_bilinear2d_nhwc",
        "(Tensor x, int[]? size, bool corners, float[]? factors)",
        aten.upsample_bilinear2d.vec,
    ),
):
    _define(name, schema, _namesake(call))
