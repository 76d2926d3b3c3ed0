"""Decompositions of operators for which torch has none, or none that can be traced: torch functions on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn import functional as F

aten = torch.ops.aten

OWN: dict[Any, Callable[..., Any]] = {}


def _decomposes(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        OWN.update(dict.fromkeys(operators, function))
        return function

    return add


def constant(values: list[int]) -> Tensor:
    """Return integers as a tensor that is a constant of the graph, also while one is traced on fake tensors."""
    with unset_fake_temporarily(), disable_proxy_modes_tracing():
        return torch.tensor(values)


# ---------------------------------------------------------------------- pools with indices


def _largest_in_windows(
    x: Tensor, pixels: Sequence[list[list[int]]], shift: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the maxima of windows, and their indices in the flat image without padding.

    Args:
        x: [.., H, W], with any number of image dimensions.
        pixels: for each image dimension the indices that each window reads, one row a window; one that is there twice does not matter.
        shift: of the indices in each dimension: what was padded before it.
        sizes: of the image without padding.
    """
    image, lead = len(pixels), x.dim() - len(pixels)
    for d, taps in enumerate(pixels):  # [.., H, W] -> [.., windows_h, taps_h, windows_w, taps_w]
        dim = lead + 2 * d
        x = x.index_select(dim, constant(list(chain(*taps)))).unflatten(dim, (len(taps), len(taps[0])))
    windows = [lead + 2 * d for d in range(image)]
    x = x.permute(*range(lead), *windows, *(w + 1 for w in windows)).flatten(lead + image)
    values, position = x.max(-1)
    indices, rest = torch.zeros_like(position), position
    stride = 1
    for d in reversed(range(image)):
        count = len(pixels[d][0])
        tap, rest = rest % count, rest // count
        window = constant(list(range(0, len(pixels[d]) * count, count))).view(-1, *[1] * (image - 1 - d))
        flat = constant([stride * (i - shift[d]) for i in chain(*pixels[d])])
        indices = indices + flat[window + tap]
        stride *= sizes[d]
    return values, indices


def _pairs(value: Any, image: int, default: Any = None) -> list[int]:
    value = default if value is None or value == [] else value
    return [value] * image if isinstance(value, int) else list(value) * (image if len(value) == 1 else 1)


@_decomposes(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def max_pool_with_indices(
    x: Tensor, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the maxima of windows and their indices in the flat image."""
    image = len(kernel) if not isinstance(kernel, int) and len(kernel) > 1 else 2
    sizes = list(x.shape[-image:])
    kernel = _pairs(kernel, image)
    stride, padding, dilation = _pairs(stride, image, kernel), _pairs(padding, image), _pairs(dilation, image)
    pixels, after = [], []
    for size, k, s, p, d in zip(sizes, kernel, stride, padding, dilation):
        span = d * (k - 1) + 1
        count = -(-(size + 2 * p - span) // s) + 1 if ceil_mode else (size + 2 * p - span) // s + 1
        if ceil_mode and (count - 1) * s >= size + p:  # a window that begins in the padding after the image
            count -= 1
        pixels.append([[window * s + tap * d for tap in range(k)] for window in range(count)])
        after.append(max(0, (count - 1) * s + span - size - p))
    lowest = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    pads = [amount for pair in zip(reversed(padding), reversed(after)) for amount in pair]
    return _largest_in_windows(F.pad(x, pads, value=lowest) if any(pads) else x, pixels, padding, sizes)


@_decomposes(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the maxima of windows that cover the image, and their indices in the flat image."""
    sizes = list(x.shape[-len(output_size) :])
    pixels = []
    for size, count in zip(sizes, output_size):
        ends = [-(-(i + 1) * size // count) for i in range(count)]
        longest = max(end - i * size // count for i, end in enumerate(ends))
        # the last pixel again, where a window is smaller
        pixels.append([[min(i * size // count + tap, end - 1) for tap in range(longest)] for i, end in enumerate(ends)])
    return _largest_in_windows(x, pixels, [0] * len(sizes), sizes)


# ---------------------------------------------------------------------- writes


@_decomposes(aten.index_reduce.default)
def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Combine slices of ``source`` with those of ``x`` that ``index`` names."""
    places = index.view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())]).expand_as(source)
    return torch.scatter_reduce(x, dim, places, source, reduce, include_self=include_self)


# ---------------------------------------------------------------------- statistics


@_decomposes(aten.var_mean.correction)
def var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean over dimensions."""
    dims = list(range(x.dim())) if dim is None else dim
    return aten.var.correction(x, dims, correction=correction, keepdim=keepdim), x.mean(dims, keepdim=keepdim)
