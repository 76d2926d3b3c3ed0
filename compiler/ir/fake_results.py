"""The result of a call: its shapes and dtypes, by a run on fake tensors, once for each kind of call.

The layers of a network repeat, and passes ask again and again: a call with the same operator, the same literals and arguments of the
same shape, stride and dtype yields what it did the last time. A call whose size its data decide has new symbols for it whenever it is
run, so it is run once, and keeps them. Where sizes are free the result must hold for all of them (:mod:`thresher.ir.free_results`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch._refs
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher.ir.free_results import for_free_sizes
from thresher.ir.sizes import SIZES, symbols_of


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
    key = (target, _kind(args), _kind(kwargs))
    if key in memory:
        return memory[key]
    symbols = symbols_of(pytree.tree_leaves((args, kwargs)))
    target = SYMBOLIC.get(target, target) if symbols else target
    if symbols and all(s in environment.backed_var_to_val for environment, s in symbols):
        result = for_free_sizes(mode, target, args, kwargs)
    else:
        with mode, torch.no_grad():
            result = target(*args, **kwargs)
    if not decides_sizes(target):
        memory[key] = result
    return result


def decides_sizes(target: Any) -> bool:
    """Return whether the data that an operator reads decide the sizes of its result, or a size (``nonzero``, ``unique``, ``item``)."""
    tags = getattr(target, "tags", ())
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags


#: What is run instead where sizes are symbols: the operator's own kernel asks for their numbers, which fixes them for all of the program.
SYMBOLIC = {torch.ops.aten.constant_pad_nd.default: torch._refs.constant_pad_nd}


def _kind(value: Any) -> Any:
    """Return what tells a call from others."""
    if isinstance(value, Tensor):
        return _kind(tuple(value.shape)), _kind(value.stride()), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple([_kind(v) for v in value])
    if isinstance(value, dict):
        return tuple([(k, _kind(v)) for k, v in value.items()])
    if isinstance(value, SIZES):
        return type(value), value.node.expr
    return type(value), str(value) if isinstance(value, float) else value  # nan is not itself
