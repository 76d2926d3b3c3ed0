"""Tensors whose memory is not that of a dense one: they are refused by name, as inputs and inside a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

from thresher.errors import CaptureError
from thresher.ir.nodes import source_line


def refuse_sparse_inputs(inputs: Any) -> None:
    """Raise :class:`CaptureError` naming the first input that is sparse, nested or quantized."""
    for path, value in tree_leaves_with_path(inputs):
        if kind := _kind(value):
            name = keystr(path[1:])
            raise CaptureError(
                f"the input {name} is a {kind} tensor, and a compiled model takes dense ones: give {name}.to_dense()"
            )


def refuse_sparse_values(graph: fx.Graph) -> None:
    """Raise :class:`CaptureError` naming the first call of ``graph`` whose result is such a tensor, and its line."""
    for node in graph.nodes:
        kind = next(filter(None, map(_kind, tree_leaves(node.meta.get("val")))), "")
        if node.op == "call_function" and kind:
            line = source_line(node)
            raise CaptureError(
                f"the model makes a {kind} tensor by {node.target}{f' ({line})' if line else ''}, and a compiled model computes with dense "
                "ones: leave it dense, and convert what the model returns"
            )


def _kind(value: Any) -> str:
    """Return the name of the kind of a tensor that is not dense; else nothing."""
    if not isinstance(value, Tensor):
        return ""
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch.")
    return "nested or quantized" if value.is_nested or value.is_quantized else ""
