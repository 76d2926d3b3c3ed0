"""A call of torch as a module: the tensors among its arguments are the inputs, everything else is part of the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from thresher.models.families.sample import Case, Inputs

#: Positional and keyword arguments of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Bound(nn.Module):
    """A function or a module with the arguments that are not tensors."""

    def __init__(self, function: Callable[..., Any], arguments: Arguments):
        super().__init__()
        self.function = function
        leaves, self.structure = pytree.tree_flatten(arguments)
        self.literals = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> Any:
        leaves = list(self.literals)
        for index, tensor in zip(self.tensors, tensors):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return self.function(*args, **kwargs)


def bound_case(function: Callable[..., Any], arguments: Arguments, other: Arguments) -> Case:
    """Return the case of a call; ``other`` gives further inputs where it differs in the values of tensors alone."""
    inputs = _tensors(arguments)
    alike = bool(inputs) and _form(arguments) == _form(other)
    return Case(Bound(function, arguments), Inputs(inputs), [Inputs(_tensors(other))] if alike else [])


def _tensors(arguments: Arguments) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))


def _form(arguments: Arguments) -> Any:
    """Return all of the arguments but the values of tensors."""

    def form(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        strides = leaf.stride() if leaf.layout == torch.strided else ()
        return leaf.shape, leaf.dtype, leaf.layout, strides, leaf.is_conj(), leaf.is_neg()

    leaves, structure = pytree.tree_flatten(arguments)
    return [form(leaf) for leaf in leaves], structure
