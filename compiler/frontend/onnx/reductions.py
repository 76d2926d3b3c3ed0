"""ONNX operators along a dimension, in torch: sums, softmax, sorting, contraction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import RULES, Node, Rule, Unsupported, rule


def _along(node: Node, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return ``function`` of x along the axis; before opset 13, over all dimensions from the axis on."""
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.dim()
    return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Rule:
    def run(node: Node, x: Any, axes: Any = None) -> Tensor:
        x, dims = node.tensor(x), node.numbers("axes", axes)
        if not dims and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(dims or range(x.dim())), bool(node.get("keepdims", 1)))

    return run


RULES |= {
    "LogSoftmax": lambda n, x: _along(n, x, torch.log_softmax), "Softmax": lambda n, x: _along(n, x, torch.softmax),
    "CumSum": lambda n, x, a: torch.cumsum(x, int(n.static(a, "axis"))),
    "Einsum": lambda n, *v: torch.einsum(n.get("equation"), *map(n.tensor, v)),
    "Trilu": lambda n, x, k=None: (torch.triu if n.get("upper", 1) else torch.tril)(x, int(n.static(0 if k is None else k, "k"))),
    "ReduceMean": _reduction(torch.mean), "ReduceSum": _reduction(torch.sum), "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin), "ReduceL2": _reduction(lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k)),
    "ReduceL1": _reduction(lambda x, d, k: x.abs().sum(d, k)), "ReduceSumSquare": _reduction(lambda x, d, k: x.square().sum(d, k)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
}  # fmt: skip


@rule("ArgMax")
def argmax(node: Node, x: Tensor) -> Tensor:
    """Return the index of the largest element along an axis, of the first where several are equal."""
    if node.get("select_last_index", 0):
        raise Unsupported("the last of equal ones")
    return x.argmax(node.get("axis", 0), bool(node.get("keepdims", 1)))


@rule("ArgMin")
def argmin(node: Node, x: Tensor) -> Tensor:
    """Return the index of the smallest element along an axis, of the first where several are equal."""
    if node.get("select_last_index", 0):
        raise Unsupported("the last of equal ones")
    return x.argmin(node.get("axis", 0), bool(node.get("keepdims", 1)))


@rule("TopK")
def topk(node: Node, x: Tensor, k: Any) -> Sequence[Tensor]:
    """Return the k largest or smallest elements along an axis, and their indices."""
    count = int(node.static(k, "k").reshape(-1)[0])
    return torch.topk(x, count, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))
