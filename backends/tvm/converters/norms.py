"""Softmax and the norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from thresher.analysis.rows.base import argument
from thresher.backends.tvm.converters.registry import (
    R,
    aten,
    cast,
    cpu_kernel,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importer import Importer, dtype_name
from thresher.backends.tvm.kernels import rows
from thresher.program import dtype_of, shape_of


@cpu_kernel(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax_kernel(importer: Importer, node: fx.Node) -> Any:
    x, dim = node.args[0], node.args[1] % len(shape_of(node))
    log, rank = "log" in str(node.target), len(shape_of(node))
    value = cast(importer, importer.value(x), "float32")
    order = [d for d in range(rank) if d != dim] + [dim]
    if dim != rank - 1:
        value = importer.emit(R.permute_dims(value, order))
    value = importer.emit_te("softmax", lambda t: rows.softmax(t, log), value)
    return value if dim == rank - 1 else importer.emit(R.permute_dims(value, [order.index(d) for d in range(rank)]))


@cpu_kernel(aten.layer_norm.default, aten.rms_norm.default)
def norm_kernel(importer: Importer, node: fx.Node) -> Any:
    """Norms over the last dimensions, which are merged into one."""
    centred = node.target is aten.layer_norm.default
    x, shape, weight = node.args[0], list(node.args[1]), argument(node, 2, "weight")
    bias = argument(node, 3, "bias") if centred else None
    epsilon = argument(node, 4, "eps", 1e-5) if centred else argument(node, 3, "eps")
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    size, whole = math.prod(shape), sizes(node)
    value, w, b = (None if n is None else importer.value(n) for n in (x, weight, bias))
    if len(shape) > 1:
        value = importer.emit(R.reshape(value, (*whole[: -len(shape)], size)))
        w, b = (None if t is None else importer.emit(R.reshape(t, (size,))) for t in (w, b))
    value = importer.emit_te("norm", lambda x, w, b: rows.norm(x, w, b, epsilon, centred), value, w, b)
    return importer.emit(R.reshape(value, whole)) if len(shape) > 1 else value


@semantics(aten.group_norm.default)
def group_norm(importer: Importer, node: fx.Node) -> Any:
    x, groups, channels = node.args[0], node.args[1], sizes(node, 1)[0]
    weight, bias, epsilon = argument(node, 2, "weight"), argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)
    dtype = np.dtype(result_dtype(node))
    w = (
        importer.weight(np.ones(channels, dtype), ("ones", channels, dtype))
        if weight is None
        else importer.value(weight)
    )
    b = importer.weight(np.zeros(channels, dtype), ("zeros", channels, dtype)) if bias is None else importer.value(bias)
    return importer.emit(
        R.nn.group_norm(importer.value(x), w, b, groups, 1, list(range(2, len(shape_of(node)))), epsilon)
    )


@semantics(aten.rms_norm.default)
def rms_norm(importer: Importer, node: fx.Node) -> Any:
    x, axes, weight, epsilon = node.args[0], len(node.args[1]), argument(node, 2, "weight"), argument(node, 3, "eps")
    dtype = dtype_of(node)
    epsilon = torch.finfo(dtype).eps if epsilon is None else epsilon
    w = (
        importer.weight(np.ones(sizes(node, len(shape_of(node)) - axes), dtype_name(dtype)), ("ones", node))
        if weight is None
        else importer.value(weight)
    )
    return importer.emit(R.nn.rms_norm(importer.value(x), w, list(range(-axes, 0)), epsilon))
