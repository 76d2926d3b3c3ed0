"""The layers of ONNX in torch: convolutions, pools, norms and products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import RULES, Node, Unsupported, plain, rule

RULES |= {
    "MatMul": plain(torch.matmul),
    "GlobalAveragePool": lambda n, x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda n, x: x.amax(tuple(range(2, x.dim())), keepdim=True),
}  # fmt: skip


def _padded(
    node: Node, x: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], fill: float
) -> tuple[Tensor, list[int]]:
    """Return x with the padding that torch cannot do by itself (more on one side), and the padding that it can."""
    rank, auto = len(window), node.get("auto_pad", "NOTSET")
    pads = list(node.get("pads") or [0] * 2 * rank)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * rank
        for d in range(rank):
            size = int(x.shape[2 + d])
            total = max(0, (-(-size // stride[d]) - 1) * stride[d] + dilation[d] * (window[d] - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            pads[d], pads[rank + d] = (less, more) if auto == "SAME_UPPER" else (more, less)
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    around = [p for d in reversed(range(rank)) for p in (pads[d], pads[rank + d])]
    return F.pad(x, around, value=fill), [0] * rank


@rule("Conv")
def conv(node: Node, x: Tensor, w: Any, b: Any = None) -> Tensor:
    """Return the convolution of x [n, c, *sizes], in one to three dimensions."""
    w = node.tensor(w)
    rank = w.dim() - 2
    stride, dilation = (node.get(k) or [1] * rank for k in ("strides", "dilations"))
    x, padding = _padded(node, x, list(w.shape[2:]), stride, dilation, 0.0)
    call = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return call(x, w, node.tensor(b), stride, padding, dilation, node.get("group", 1))


@rule("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, w: Any, b: Any = None) -> Tensor:
    """Return the transposed convolution, with the same padding on both sides."""
    w = node.tensor(w)
    rank = w.dim() - 2
    pads = node.get("pads") or [0] * 2 * rank
    if (
        node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or node.get("output_shape")
        or pads[:rank] != pads[rank:]
    ):
        raise Unsupported("padding that is not the same on both sides")
    stride, dilation = (node.get(k) or [1] * rank for k in ("strides", "dilations"))
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return call(
        x, w, node.tensor(b), stride, pads[:rank], node.get("output_padding") or 0, node.get("group", 1), dilation
    )


@rule("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    """Return the largest element of each window; padding counts as minus infinity."""
    window = node.get("kernel_shape")
    stride, dilation = (node.get(k) or [1] * len(window) for k in ("strides", "dilations"))
    if node.outputs > 1:
        raise Unsupported("the places of the largest are asked for")
    x, padding = _padded(node, x, window, stride, dilation, -math.inf)
    call = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1]
    return call(x, window, stride, padding, dilation, bool(node.get("ceil_mode", 0)))


@rule("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Return the mean of each window."""
    window, counts = node.get("kernel_shape"), bool(node.get("count_include_pad", 0))
    stride = node.get("strides") or [1] * len(window)
    if any(d != 1 for d in node.get("dilations") or ()):
        raise Unsupported("dilations")
    before = x.shape
    x, padding = _padded(node, x, window, stride, [1] * len(window), 0.0)
    if x.shape != before and not counts:
        raise Unsupported("padding that is not the same on both sides and is not counted")
    call = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1]
    return call(x, window, stride, padding, bool(node.get("ceil_mode", 0)), counts)


@rule("BatchNormalization")
def batch_norm(node: Node, x: Tensor, *parameters: Any) -> Tensor:
    """Return x normalised by the statistics of the file."""
    scale, bias, mean, variance = map(node.tensor, parameters)
    if node.get("training_mode", 0):
        raise Unsupported("training mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@rule("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Any, bias: Any) -> Tensor:
    """Return x normalised per sample and channel."""
    return F.instance_norm(x, weight=node.tensor(scale), bias=node.tensor(bias), eps=node.get("epsilon", 1e-5))


@rule("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Any, bias: Any = None) -> Tensor:
    """Return x normalised over the dimensions from ``axis`` on."""
    shape = x.shape[node.get("axis", -1) :]
    return F.layer_norm(x, shape, node.tensor(scale).expand(shape), node.tensor(bias), node.get("epsilon", 1e-5))


@rule("Gemm")
def gemm(node: Node, a: Any, b: Any, c: Any = None) -> Tensor:
    """Return alpha A B + beta C; F.linear where it says the same."""
    a, b, c = (node.tensor(v) for v in (a, b, c))
    a = a.mT if node.get("transA", 0) else a
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transB", 0) and alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1)):
        return F.linear(a, b, c)
    product = alpha * (a @ (b.mT if node.get("transB", 0) else b))
    return product if c is None else product + beta * c
