"""The norms of ONNX in torch, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from thresher.frontend.onnx.dtypes import torch_dtype
from thresher.frontend.onnx.rules import Floats, Ints, Node, rule
from thresher.frontend.onnx.values import Unsupported


@rule("BatchNormalization", since=14)
def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float,
    momentum: float,
    training_mode: int,
) -> Tensor | Sequence[Tensor]:
    """Return x normalised by the statistics of the file; in training form by its own, and the moving ones."""
    if not training_mode:
        return _batch_norm(x, scale, bias, mean, variance, epsilon)
    dims = [d for d in range(x.dim()) if d != 1]
    own_mean, own_variance = x.mean(dims), x.var(dims, correction=0)
    result = _batch_norm(x, scale, bias, own_mean, own_variance, epsilon)
    moving = [
        new.to(old.dtype) * (1 - momentum) + old * momentum for new, old in ((own_mean, mean), (own_variance, variance))
    ]
    return result, *moving


@rule("BatchNormalization", since=7)
def batch_norm_of_inference(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float,
    momentum: float,
    spatial: int = 1,
) -> Tensor:
    """Return x normalised by the statistics of the file, which are of channels, or of all of a sample's elements."""
    if spatial:
        return _batch_norm(x, scale, bias, mean, variance, epsilon)
    return (x - mean) * (scale / torch.sqrt(variance + epsilon)) + bias


@rule("BatchNormalization")
def batch_norm_of_opset_6(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    consumed_inputs: Any = None,
    epsilon: float,
    is_test: int,
    momentum: float,
    spatial: int,
) -> Tensor:
    """Return x normalised by the statistics of the file."""
    if not is_test:
        raise Unsupported("training form")
    return batch_norm_of_inference(x, scale, bias, mean, variance, epsilon=epsilon, momentum=momentum, spatial=spatial)


def _batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    scale, bias, mean, variance = (v.to(x.dtype) for v in (scale, bias, mean, variance))
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@rule("InstanceNormalization", since=6)
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Return x normalised for each sample and channel."""
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@rule("LayerNormalization")
def layer_norm(
    node: Node, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int, epsilon: float, stash_type: int
) -> Any:
    """Return x normalised over the dimensions from ``axis`` on; where mean and deviation are asked for, the specification computes them."""
    shape = x.shape[axis:]
    if node.outputs > 1 or not _computes_in(x, stash_type):
        return NotImplemented
    return F.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


@rule("RMSNormalization")
def rms_norm(x: Tensor, scale: Tensor, *, axis: int, epsilon: float, stash_type: int) -> Any:
    """Return x over the root of its mean square over the dimensions from ``axis`` on."""
    if not _computes_in(x, stash_type) or scale.shape != x.shape[axis:] or scale.dtype != x.dtype:
        return NotImplemented
    return F.rms_norm(x, x.shape[axis:], scale, epsilon)


@rule("GroupNormalization", since=21)
def group_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float, num_groups: int, stash_type: int) -> Any:
    """Return x normalised for each sample and group of channels."""
    return F.group_norm(x, num_groups, scale, bias, epsilon) if _computes_in(x, stash_type) else NotImplemented


@rule("GroupNormalization")
def group_norm_of_groups(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float, num_groups: int) -> Tensor:
    """Return x normalised for each sample and group of channels; scale and bias are of groups."""
    repeats = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), epsilon)


def _computes_in(x: Tensor, stash_type: int) -> bool:
    """Say whether torch's norm of x computes in the type that the attribute names: it uses float32 for smaller types."""
    return x.dtype == torch_dtype(stash_type) or (stash_type == TensorProto.FLOAT and x.element_size() == 2)


@rule("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int, p: int) -> Tensor:
    """Return x over its p-norm along an axis, 0 where that is 0."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, 0.0, x / norm).to(x.dtype)


@rule("Dropout", since=12)
def dropout(
    x: Tensor, ratio: Floats | None = None, training_mode: Ints | None = None, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return x, and that all of it is kept; refuse training form, which is random unless the ratio is 0."""
    if training_mode and training_mode[0] and (ratio is None or ratio[0] != 0):
        raise Unsupported("dropout in training form, which is random")
    return x, torch.ones_like(x, dtype=torch.bool)


@rule("Dropout", since=10)
def dropout_of_inference(x: Tensor, *, ratio: float) -> tuple[Tensor, Tensor]:
    """Return x, and that all of it is kept."""
    return x, torch.ones_like(x, dtype=torch.bool)


@rule("Dropout", since=7)
def dropout_with_mask(x: Tensor, *, ratio: float) -> tuple[Tensor, Tensor]:
    """Return x, and ones in its type."""
    return x, torch.ones_like(x)


@rule("Dropout")
def dropout_of_opset_6(x: Tensor, *, consumed_inputs: Any = None, is_test: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Return x, and ones in its type; refuse training form."""
    if not is_test:
        raise Unsupported("dropout in training form, which is random")
    return dropout_with_mask(x, ratio=ratio)
