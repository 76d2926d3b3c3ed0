"""The pools of ONNX in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, Node, plain, rule
from thresher.frontend.onnx.values import Unsupported
from thresher.frontend.onnx.windows import Window, window_of

MAX_POOLS, AVERAGE_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d), (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)

plain({
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
})  # fmt: skip


@rule("MaxPool")
def max_pool(
    node: Node,
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str,
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the largest element of each window, and its index in the whole tensor; padding counts as minus infinity."""
    window = window_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    _check_rank(window)
    image = x if x.is_floating_point() else x.to(torch.float32)  # torch pools no bytes; float32 has all of them
    cut: Sequence[int] = [0] * len(window.size)
    if not window.symmetric or any(2 * p > k for p, k in zip(window.before, window.size)):
        cut = window.before
        image, window = window.padded(image, -math.inf)
    call = MAX_POOLS[len(window.size) - 1]
    arguments = (list(window.size), list(window.stride), list(window.before), list(window.dilation), window.ceil)
    if node.outputs == 1:
        return call(image, *arguments).to(x.dtype)
    largest, index = call(image, *arguments, return_indices=True)
    return largest.to(x.dtype), _whole_index(index, image.shape[2:], x.shape, cut, bool(storage_order))


def _whole_index(
    index: Tensor, padded: Sequence[int], shape: Sequence[int], before: Sequence[int], columns_first: bool
) -> Tensor:
    """Return indices within padded images as indices within the whole tensor, of ``shape``."""
    coordinates = []
    for size in reversed(padded):
        coordinates.append(index % size)
        index = torch.div(index, size, rounding_mode="floor")
    coordinates = [c - b for c, b in zip(coordinates[::-1], before)]
    sizes = list(shape[2:])
    if columns_first:
        coordinates, sizes = coordinates[::-1], sizes[::-1]
    image = torch.arange(shape[0] * shape[1]).reshape(*shape[:2], *[1] * len(sizes))
    for coordinate, size in zip(coordinates, sizes):
        image = image * size + coordinate
    return image


@rule("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the mean of each window, with or without the padding in it."""
    window = window_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    _check_rank(window)
    small = all(2 * p <= k for p, k in zip(window.before, window.size))
    if window.symmetric and small and all(d == 1 for d in window.dilation):
        call = AVERAGE_POOLS[len(window.size) - 1]
        arguments = (list(window.size), list(window.stride), list(window.before), window.ceil, bool(count_include_pad))
        return call(x, *arguments)
    return _sums(x, window) / _counts(x, window, bool(count_include_pad))


@rule("LpPool", since=2)
def lp_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str,
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the p-norm of each window."""
    window = window_of(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    _check_rank(window)
    return _sums(x.abs().pow(p), window).pow(1 / p)


@rule("GlobalLpPool", since=2)
def global_lp_pool(x: Tensor, *, p: int) -> Tensor:
    """Return the p-norm of each channel."""
    return torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)


@rule("MaxUnpool")
def max_unpool(
    x: Tensor,
    index: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return a tensor of zeros with the elements of x at the indices that a MaxPool gave."""
    window = window_of(x, kernel_shape, strides, None, pads, "NOTSET")
    sizes = [
        (int(n) - 1) * s + k - b - a
        for n, s, k, b, a in zip(x.shape[2:], window.stride, window.size, window.before, window.after)
    ]
    inner = [*x.shape[:2], *sizes]
    flat = x.new_zeros(math.prod(inner)).scatter(0, index.reshape(-1), x.reshape(-1)).reshape(inner)
    if output_shape is None:
        return flat
    return F.pad(flat, [n for s, o in zip(reversed(sizes), reversed(output_shape)) for n in (0, o - s)])


@rule("LRN")
def lrn(x: Tensor, *, alpha: float, beta: float, bias: float, size: int) -> Tensor:
    """Return x over the root of squares in a window of channels; torch's window is another one for even sizes."""
    if size % 2:
        return F.local_response_norm(x, size, alpha, beta, bias)
    squares = (
        F.pad(x.square().transpose(1, -1), ((size - 1) // 2, size // 2)).unfold(-1, size, 1).sum(-1).transpose(1, -1)
    )
    return x / (bias + alpha / size * squares).pow(beta)


def _check_rank(window: Window) -> None:
    if len(window.size) not in (1, 2, 3):
        raise Unsupported(f"a pool in {len(window.size)} dimensions")


def _sums(x: Tensor, window: Window) -> Tensor:
    """Return the sum of each window, by a convolution of each channel with ones."""
    x, window = window.padded(x, 0.0)
    rank = len(window.size)
    ones = x.new_ones(x.shape[1], 1, *window.size)
    call = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return call(x, ones, None, list(window.stride), 0, list(window.dilation), x.shape[1])


def _counts(x: Tensor, window: Window, of_padding: bool) -> Tensor:
    """Return how many elements each window has, without the part of it that is outside of the input, or of the padding."""
    ones = x.new_ones(1, 1, *x.shape[2:])
    if not of_padding:
        return _sums(ones, window)
    outside = window.outside([int(s) for s in x.shape[2:]])
    around = [n for b, a in zip(window.before[::-1], window.after[::-1]) for n in (b, a)]
    inside = F.pad(F.pad(ones, around, value=1.0), [n for o in outside[::-1] for n in (0, o)])
    none = [0] * len(window.size)
    return _sums(inside, replace(window, before=none, after=none, ceil=False))
