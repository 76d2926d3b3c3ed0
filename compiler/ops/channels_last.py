"""Image operators on channels-last tensors, ``[N, H, W, C]``: what the CPU backend has kernels for.

Each is its ATen namesake between two permutations; weights keep ATen's layout and are packed by the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def _define(name: str, schema: str, reference: Callable[..., Tensor]) -> None:
    """An operator whose reference runs on any device, under autograd and on fake tensors (it is a composition)."""
    torch.library.define(f"thresher::{name}", f"{schema} -> Tensor")
    torch.library.impl(f"thresher::{name}", "CompositeImplicitAutograd")(reference)


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return _last(aten.conv2d.default(_first(x), weight, bias, stride, padding, dilation, groups))


def _conv_transpose2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], groups: int, dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    return _last(
        aten.conv_transpose2d.input(_first(x), weight, bias, stride, padding, output_padding, groups, dilation)
    )


def _max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    return _last(aten.max_pool2d.default(_first(x), kernel, stride, padding, dilation, ceil_mode))


def _avg_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, count_include_pad: bool, divisor: int | None,
) -> Tensor:  # fmt: skip
    return _last(aten.avg_pool2d.default(_first(x), kernel, stride, padding, ceil_mode, count_include_pad, divisor))


_define(
    "conv2d_nhwc",
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)",
    _conv2d,
)
_define(
    "conv_transpose2d_nhwc",
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] output_padding, int groups, int[] dilation)",
    _conv_transpose2d,
)
_define(
    "max_pool2d_nhwc",
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode)",
    _max_pool2d,
)
_define(
    "avg_pool2d_nhwc",
    "(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, int? divisor)",
    _avg_pool2d,
)
