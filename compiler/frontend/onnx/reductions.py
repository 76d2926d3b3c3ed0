"""ONNX operators along a dimension, in torch: sums, softmax, sorting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thresher.frontend.onnx.rules import Ints, Unsigned, rule

Along = Callable[[Tensor, int], Tensor]
Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def along_axis(name: str, function: Along) -> None:
    """Register ``function(x, axis)``; before opset 13 it is over all dimensions from the axis on."""

    def over_one(x: Tensor, *, axis: int) -> Tensor:
        return function(x, axis)

    def over_the_rest(x: Tensor, *, axis: int) -> Tensor:
        axis = axis % x.dim()
        return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)

    rule(name)(over_the_rest)
    rule(name, since=13)(over_one)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    """Return 1 at the first of the largest elements along an axis, else 0."""
    first = x.argmax(axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, torch.ones_like(first, dtype=x.dtype))


along_axis("Softmax", torch.softmax)
along_axis("LogSoftmax", torch.log_softmax)
along_axis("Hardmax", _hardmax)


def reduction(name: str, function: Reduction, since: int = 18, unsigned: Unsigned = "bits") -> None:
    """Register a reduction: its axes are an attribute, and an input from the opset ``since`` on."""

    def by_attribute(x: Tensor, *, axes: Sequence[int] | None = None, keepdims: int) -> Tensor:
        return function(x, tuple(range(x.dim()) if axes is None else axes), bool(keepdims))

    def by_input(x: Tensor, axes: Ints | None = None, *, keepdims: int, noop_with_empty_axes: int) -> Tensor:
        if not axes and noop_with_empty_axes:
            return function(x, (), bool(keepdims)) if name in ELEMENTWISE_WITHOUT_AXES else x
        return function(x, tuple(axes or range(x.dim())), bool(keepdims))

    rule(name, unsigned=unsigned)(by_attribute)
    rule(name, since=since, unsigned=unsigned)(by_input)


def _product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    for d in sorted((d % x.dim() for d in dims), reverse=True):
        x = x.prod(d, keepdim=keep, dtype=x.dtype)
    return x


def _extreme(of_numbers: Reduction, of_booleans: Reduction, empty: Callable[[torch.dtype], float]) -> Reduction:
    """Return the largest or the smallest element; ``empty`` is the result of no elements."""

    def run(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        if x.dtype == torch.bool:
            return of_booleans(x, dims, keep)
        if x.numel():
            return of_numbers(x, dims, keep) if dims else x
        sizes = [1 if d in {e % x.dim() for e in dims} else s for d, s in enumerate(x.shape)]
        result = x.new_full(sizes, empty(x.dtype))
        return (
            result
            if keep
            else result.reshape([s for d, s in enumerate(x.shape) if d not in {e % x.dim() for e in dims}])
        )

    return run


def _least(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _largest(dtype: torch.dtype) -> float:
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _floating(function: Reduction) -> Reduction:
    """Return a reduction that whole numbers go through as float64, and back."""

    def run(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        return function(x, dims, keep) if x.is_floating_point() else function(x.double(), dims, keep).to(x.dtype)

    return run


def _sum(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep, dtype=x.dtype) if dims else x


ELEMENTWISE_WITHOUT_AXES = {"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"}
reduction("ReduceSum", _sum, since=13)
reduction("ReduceMean", _floating(torch.mean))
reduction("ReduceProd", _product)
reduction("ReduceMax", _extreme(torch.amax, torch.any, _least), unsigned="order")
reduction("ReduceMin", _extreme(torch.amin, torch.all, _largest), unsigned="order")
reduction("ReduceL1", lambda x, d, k: _sum(x.abs(), d, k))
reduction("ReduceL2", _floating(lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k) if d else x.abs()))
reduction("ReduceSumSquare", lambda x, d, k: _sum(x.square(), d, k))
reduction("ReduceLogSum", _floating(lambda x, d, k: _sum(x, d, k).log()))
reduction("ReduceLogSumExp", _floating(lambda x, d, k: torch.logsumexp(x, d, k) if d else x))


def index_of(name: str, function: Callable[[Tensor, int, bool], Tensor]) -> None:
    """Register the index of an extreme element along an axis: of the first one, or of the last one where several are equal."""

    def run(x: Tensor, *, axis: int, keepdims: int, select_last_index: int = 0) -> Tensor:
        if not select_last_index:
            return function(x, axis, bool(keepdims))
        return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))

    rule(name, unsigned="order")(run)


index_of("ArgMax", torch.argmax)
index_of("ArgMin", torch.argmin)


@rule("TopK", since=11, unsigned="order")
def topk(x: Tensor, k: Ints, *, axis: int, largest: int, sorted: int) -> tuple[Tensor, Tensor]:
    """Return the k largest or smallest elements along an axis and their indices; of equal ones those of the lowest indices."""
    values, indices = torch.sort(
        x, dim=axis, descending=bool(largest), stable=True
    )  # torch.topk takes any of equal ones
    return values.narrow(axis, 0, k[0]), indices.narrow(axis, 0, k[0])


@rule("TopK", since=10)
def topk_largest(x: Tensor, k: Ints, *, axis: int) -> tuple[Tensor, Tensor]:
    """Return the k largest elements along an axis and their indices."""
    return topk(x, k, axis=axis, largest=1, sorted=1)


@rule("TopK")
def topk_by_attribute(x: Tensor, *, axis: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest elements along an axis and their indices."""
    return topk(x, [k], axis=axis, largest=1, sorted=1)


def cumulated(name: str, function: Callable[..., Tensor], neutral: int) -> None:
    """Register the running sum or product along an axis; ``neutral`` is the result of no elements."""

    def run(x: Tensor, axis: Ints, *, exclusive: int, reverse: int) -> Tensor:
        dim = axis[0]
        x = x.flip(dim) if reverse else x
        y = function(x, dim, dtype=x.dtype)
        if exclusive:
            first = torch.full_like(y.narrow(dim, 0, 1), neutral)
            y = torch.cat([first, y.narrow(dim, 0, int(y.shape[dim]) - 1)], dim)
        return y.flip(dim) if reverse else y

    rule(name)(run)


cumulated("CumSum", torch.cumsum, 0)
cumulated("CumProd", torch.cumprod, 1)
