"""Norms some of whose channels are constant and therefore gone: they still count in the mean and the variance.

With N channels of which those in K are there and the others were the constants c,

    mean = (sum_K x + sum c) / N
    var  = (sum_K (x - mean)^2 + sum c^2 - 2 mean sum c + (N - |K|) mean^2) / N

so three numbers stand for what is gone: ``count`` = N, ``total`` = sum c, ``square`` = sum c^2.

    thresher::layer_norm    x [..., C], over the last dimension       Layer normalization, Ba et al., 2016
    thresher::group_norm    x [N, C, ...], over groups of channels    Group normalization, Wu and He, 2018

Group g of group_norm holds ``widths[g]`` of the C channels that are there; weight and bias are [C] or None.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: int, total: float, square: float
) -> Tensor:
    mean = (x.sum(-1, keepdim=True) + total) / count
    centred = x - mean
    gone = square - 2 * total * mean + (count - x.shape[-1]) * mean * mean
    y = centred * torch.rsqrt(((centred * centred).sum(-1, keepdim=True) + gone) / count + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    x: Tensor,
    widths: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: int,
    totals: list[float],
    squares: list[float],
) -> Tensor:
    parts, spatial = [], x.shape[2:].numel()
    for part, total, square in zip(x.flatten(2).split(widths, 1), totals, squares):
        elements = count * spatial
        mean = (part.sum((1, 2), keepdim=True) + total * spatial) / elements
        centred = part - mean
        gone = spatial * (square - 2 * total * mean + (count - part.shape[1]) * mean * mean)
        parts.append(centred * torch.rsqrt(((centred * centred).sum((1, 2), keepdim=True) + gone) / elements + eps))
    y = torch.cat(parts, 1).reshape(x.shape)
    shape = [-1] + [1] * (x.dim() - 2)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


torch.library.define(
    "thresher::layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, int count, float total, float square) -> Tensor",
)
torch.library.impl("thresher::layer_norm", "CompositeImplicitAutograd")(_layer_norm)
torch.library.define(
    "thresher::group_norm",
    "(Tensor x, int[] widths, Tensor? weight, Tensor? bias, float eps, int count, float[] totals, float[] squares) -> Tensor",
)
torch.library.impl("thresher::group_norm", "CompositeImplicitAutograd")(_group_norm)
