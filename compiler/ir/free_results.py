"""The fake result of a call on free sizes: it holds for other sizes than those of the example, or it is an error.

An operator may ask for the number of a size although its result does not depend on it: which of its kernels to take, whether a tensor is
contiguous. So the call is run without guards, with the sizes of the example as answers, and once more on other numbers: the shapes must
be what the first result says for these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher.ir.sizes import SIZES, Numbers, number, other_sizes


class ExampleOnly(NotImplementedError):
    """A call fits the sizes of the example, and no others of those that are free."""


def for_free_sizes(mode: FakeTensorMode, target: Any, args: Any, kwargs: Any) -> Any:
    """Return the fake result of ``target``, whose arguments have free sizes.

    Raises the operator's error where its arguments do not fit, and :class:`ExampleOnly` where they, or the result, fit the example only.
    """
    with _without_guards(mode.shape_env), mode, torch.no_grad():
        result = target(*args, **kwargs)
    refused: Exception | None = None
    for numbers in other_sizes(pytree.tree_leaves((args, kwargs))):
        try:
            other = _concrete(target, args, kwargs, numbers)
        except Exception as error:  # whatever an operator of torch raises: it does not take these sizes
            refused = error
            continue
        if _shapes(result, numbers) != _shapes(other, {}):
            raise ExampleOnly(f"{target} on free sizes has a shape that holds for those of the example only")
        return result
    if refused is not None:
        raise ExampleOnly(f"{target} fits the sizes of the example only: {refused}") from refused
    return result


@contextmanager
def _without_guards(environment: Any) -> Iterator[None]:
    """Let sizes be asked without consequence, also where they are kept free: there torch's ``suppress_guards`` alone is an error."""
    strict, environment._error_on_new_guards = environment._error_on_new_guards, False
    try:
        with environment.suppress_guards():
            yield
    finally:
        environment._error_on_new_guards = strict


def _concrete(target: Any, args: Any, kwargs: Any, numbers: Numbers) -> Any:
    """Run ``target`` on fake tensors with these numbers as sizes; torch logs no failure, which is an answer here."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape, stride = ([number(d, numbers) for d in dims] for dims in (value.shape, value.stride()))
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return number(value, numbers) if isinstance(value, SIZES) else value

    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(), torch.no_grad():
            args, kwargs = pytree.tree_map(one, (args, kwargs))
            return target(*args, **kwargs)
    finally:
        log.disabled = silent


def _shapes(result: Any, numbers: Numbers) -> list[Any]:
    """Return the shapes and dtypes of the tensors in a result, and its numbers."""
    return [
        ([number(d, numbers) for d in v.shape], v.dtype) if isinstance(v, Tensor) else number(v, numbers)
        for v in pytree.tree_leaves(result)
    ]
