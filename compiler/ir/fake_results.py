"""The result of a call: its shapes and dtypes, by a run on fake tensors, once for each kind of call.

The layers of a network repeat, and passes ask again and again: a call with the same operator, the same literals and arguments of the
same shape, stride and dtype yields what it did the last time. Calls with dynamic shapes are run every time. A call whose size its data
decide has new symbols for it whenever it is run, so it is run once, and keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._refs
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode


def result_of(node: fx.Node, mode: FakeTensorMode) -> Any:
    """Return the fake result of ``node`` for the metadata of its arguments. Raises the operator's error where it does not fit them."""
    if "val" in node.meta and (decides_sizes(node.target) or node.meta.get("unbacked_bindings")):
        return node.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    return _remembered(mode, node.target, args, kwargs)


def empty(shape: torch.Size, dtype: torch.dtype, mode: FakeTensorMode) -> Tensor:
    """Return a contiguous fake tensor."""
    return _remembered(mode, torch.empty, (list(shape),), {"dtype": dtype})


def _remembered(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    memory = vars(mode).setdefault("_thresher_results", {})  # as long-lived as the fake tensors in it
    try:
        key = (target, _kind(args), _kind(kwargs))
        if key in memory:
            return memory[key]
    except _Dynamic:
        key = None
    with mode, torch.no_grad():
        result = (target if key is not None else SYMBOLIC.get(target, target))(*args, **kwargs)
    if key is not None and not decides_sizes(target):
        memory[key] = result
    return result


def decides_sizes(target: Any) -> bool:
    """Return whether the data that an operator reads decide the sizes of its result, or a size (``nonzero``, ``unique``, ``item``)."""
    tags = getattr(target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


#: What is run instead where sizes are symbols: the operator's own kernel asks for their numbers, which fixes them for all of the program.
SYMBOLIC = {torch.ops.aten.constant_pad_nd.default: torch._refs.constant_pad_nd}


class _Dynamic(Exception):
    """The call has a symbolic number in it."""


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (_numbers(value.shape), _numbers(value.stride()), value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        return tuple([_kind(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _kind(v)) for k, v in value.items()])
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        raise _Dynamic
    return type(value), str(value) if isinstance(value, float) else value  # nan is not itself


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(n) is int for n in numbers):
        raise _Dynamic
    return numbers
