"""The convolutions of ONNX in torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, rule
from thresher.frontend.onnx.values import Unsupported
from thresher.frontend.onnx.windows import window_of


@rule("Conv")
def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of x [n, c, *sizes], in one to three dimensions."""
    rank = _rank(w, kernel_shape)
    window = window_of(x, list(w.shape[2:]), strides, dilations, pads, auto_pad)
    if not window.symmetric:
        x, window = window.padded(x, 0.0)
    call = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return call(x, w, b, list(window.stride), list(window.before), list(window.dilation), group)


@rule("ConvTranspose")
def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the transposed convolution: by torch where the padding is the same on both sides, else cut out of the whole one."""
    rank = _rank(w, kernel_shape)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    full = [
        s * (int(n) - 1) + d * (k - 1) + 1 + e
        for s, n, d, k, e in zip(stride, x.shape[2:], dilation, w.shape[2:], extra)
    ]
    before, after = _cuts(x, full, stride, auto_pad, output_shape, pads)
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    if before == after and min(before) >= 0 and all(e < max(s, d) for e, s, d in zip(extra, stride, dilation)):
        return call(x, w, b, stride, before, extra, group, dilation)
    whole = call(x, w, None, stride, 0, 0, group, dilation)
    cut = [n for p, a, e in zip(before[::-1], after[::-1], extra[::-1]) for n in (-p, e - a)]
    result = F.pad(whole, cut)
    return result if b is None else result + b.reshape(-1, *[1] * rank)


def _cuts(
    x: Tensor,
    full: Sequence[int],
    stride: Sequence[int],
    auto_pad: str,
    output_shape: Sequence[int] | None,
    pads: Sequence[int] | None,
) -> tuple[list[int], list[int]]:
    """Return how much is cut off before and after the whole result, of the sizes ``full``."""
    rank = len(full)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER") and not output_shape:
        output_shape = [int(n) * s for n, s in zip(x.shape[2:], stride)]
    if output_shape:
        totals = [f - n for f, n in zip(full, output_shape[-rank:])]
        half, rest = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (half, rest) if auto_pad == "SAME_UPPER" else (rest, half)
    pads = list(pads or [0] * 2 * rank) if auto_pad == "NOTSET" else [0] * 2 * rank
    return pads[:rank], pads[rank:]


def _rank(w: Tensor, kernel_shape: Sequence[int] | None) -> int:
    """Return the number of spatial dimensions of a kernel; raise :class:`Unsupported` where torch has no convolution of as many."""
    rank = w.dim() - 2
    if kernel_shape is not None and list(w.shape[2:]) != list(kernel_shape):
        raise Unsupported(f"a kernel of {list(w.shape[2:])} where kernel_shape is {list(kernel_shape)}")
    if rank not in (1, 2, 3):
        raise Unsupported(f"a convolution in {rank} dimensions")
    return rank


@rule("Col2Im")
def col2im(
    x: Tensor,
    image: Ints,
    block: Ints,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the sum of blocks [n, c * block, count] at their places in images [n, c, *image]."""
    n, rank, taps = x.shape[0], len(image), torch.Size(block).numel()
    window = window_of(x.new_empty(1, 1, *image), list(block), strides, dilations, pads, "NOTSET")
    counts = [window.count(d, size) for d, size in enumerate(image)]
    whole = [s + b + a for s, b, a in zip(image, window.before, window.after)]
    steps = [
        torch.arange(c)[:, None] * s + torch.arange(k) * d
        for c, s, k, d in zip(counts, window.stride, block, window.dilation)
    ]
    index = torch.zeros(*[1] * 2 * rank, dtype=torch.int64)  # of each tap, then of each block
    for d, step in enumerate(steps):
        shape = [1] * 2 * rank
        shape[d], shape[rank + d] = block[d], counts[d]
        index = index * whole[d] + step.mT.reshape(shape)
    flat = x.reshape(n, -1, taps * torch.Size(counts).numel())
    summed = flat.new_zeros(*flat.shape[:2], torch.Size(whole).numel())
    summed = summed.scatter_add(2, index.reshape(1, 1, -1).expand(flat.shape), flat).reshape(*flat.shape[:2], *whole)
    cut = [v for b, a in zip(window.before[::-1], window.after[::-1]) for v in (-b, -a)]
    return F.pad(summed, cut)


@rule("DeformConv")
def deform_conv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Return the convolution of an image [n, c, h, w] read beside its grid, at offsets for each tap (Dai et al. 2017, Zhu et al. 2019)."""
    if _rank(w, kernel_shape) != 2:
        raise Unsupported("a deformable convolution that is not of images")
    window = window_of(x, list(w.shape[2:]), strides, dilations, pads, "NOTSET")
    n, channels, height, width = (int(s) for s in x.shape)
    rows, columns = (window.count(d, s) for d, s in enumerate((height, width)))
    taps = w.shape[2] * w.shape[3]
    shift = offset.reshape(n, offset_group, taps, 2, rows, columns)
    grid = []
    for d, count in enumerate((rows, columns)):
        start = torch.arange(count) * window.stride[d] - window.before[d]
        tap = torch.arange(w.shape[2 + d]) * window.dilation[d]
        taps_of = tap.repeat_interleave(w.shape[3]) if d == 0 else tap.repeat(w.shape[2])
        start = start.reshape(-1, 1) if d == 0 else start.reshape(1, -1)
        grid.append(shift[:, :, :, d] + (taps_of.reshape(1, 1, -1, 1, 1) + start).to(x.dtype))
    image = x.reshape(n * offset_group, channels // offset_group, height * width)
    points = [g.reshape(n * offset_group, -1) for g in grid]
    read = _interpolated(image, points[0], points[1], (height, width))
    read = read.reshape(n, offset_group, channels // offset_group, taps, rows * columns)
    if mask is not None:
        read = read * mask.reshape(n, offset_group, 1, taps, rows * columns)
    grouped = read.reshape(n, group, channels // group * taps, rows * columns)
    kernel = w.reshape(group, -1, w.shape[1] * taps)
    result = torch.matmul(kernel, grouped).reshape(n, -1, rows, columns)
    return result if b is None else result + b.reshape(-1, 1, 1)


def _interpolated(image: Tensor, y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return flat images [n, c, h * w] at points [n, count] between their pixels; outside of them they are 0."""
    total = image.new_zeros(())
    for row, row_weight in _around(y, size[0]):
        for column, column_weight in _around(x, size[1]):
            index = (row * size[1] + column).unsqueeze(1).expand(-1, image.shape[1], -1)
            total = total + torch.gather(image, 2, index) * (row_weight * column_weight).unsqueeze(1)
    return total


def _around(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two indices around each position, and their weights: 0 outside."""
    low = position.floor()
    return [
        (index.clamp(0, size - 1).to(torch.int64), torch.where((index >= 0) & (index < size), weight, 0.0))
        for index, weight in ((low, 1 - (position - low)), (low + 1, position - low))
    ]
