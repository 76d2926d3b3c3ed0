"""The call of an operator of torch from compiled code: the half that runs.

The code calls :func:`call` by its registered name with a text that names the operator and its literals, the free sizes among them, and the
tensors. Code with such calls needs torch where it runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

import thresher.ops  # noqa: F401  (registers the operators that a call may name)
from thresher.backends.tvm.runtime import aligned
from thresher.errors import OperatorError

CALL = "thresher.library"

tvm_ffi.register_error(OperatorError)  # which passes through compiled code as what it is

Arguments = Callable[[Sequence[Tensor], Sequence[int]], Any]


@tvm_ffi.register_global_func(CALL, override=True)
def call(text: str, sizes: Any, *tensors: Any) -> Any:
    """Compute an operator by torch. A result that is no tensor becomes one without dimensions, None an empty one.

    Raises :class:`OperatorError` naming the node where torch raises.
    """
    inputs = [torch.from_dlpack(t) for t in tensors]
    node, compute = _parsed(text)
    try:
        with torch.no_grad():
            result = compute(inputs, sizes)
    except Exception as error:
        raise OperatorError(f"{node}: {error}") from error
    memory = {t.untyped_storage().data_ptr() for t in inputs}
    if isinstance(result, (tuple, list)):
        return tvm_ffi.convert([_handed_over(r, memory) for r in result])
    return _handed_over(result, memory)


def _handed_over(result: Any, memory: set[int]) -> Any:
    """Return a result in memory of its own: that of the arguments is used again by the code that calls."""
    if not isinstance(result, Tensor):
        result = torch.empty(0) if result is None else torch.tensor(result)
    result = aligned(result)
    return tvm_ffi.from_dlpack(result.clone() if result.untyped_storage().data_ptr() in memory else result)


@functools.cache
def _parsed(text: str) -> tuple[str, Arguments]:
    """Return the node and its operator by their names, and the function that computes it."""
    name, node, *arguments = json.loads(text)
    namespace, operator, overload = name.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), operator), overload)
    args, kwargs = map(_reader, arguments)
    return f"{node} ({name})", lambda tensors, sizes: target(*args(tensors, sizes), **kwargs(tensors, sizes))


def _reader(item: Any) -> Arguments:
    """Return the function from the tensors and sizes of a call to the argument that ``item`` writes."""
    if isinstance(item, list):
        readers = [_reader(i) for i in item]
        return lambda tensors, sizes: [read(tensors, sizes) for read in readers]
    if not isinstance(item, dict):
        return lambda tensors, sizes: item
    ((kind, content),) = item.items()
    if kind == "kwargs":
        keywords = {k: _reader(v) for k, v in content.items()}
        return lambda tensors, sizes: {k: read(tensors, sizes) for k, read in keywords.items()}
    if kind == "tensor":
        return lambda tensors, sizes: tensors[content]
    if kind == "complex":
        return lambda tensors, sizes: torch.view_as_complex(tensors[content])
    if kind == "item":
        return lambda tensors, sizes: tensors[content].item()
    if kind == "size":
        return lambda tensors, sizes: int(sizes[content])
    constant = complex(*content) if kind == "number" else getattr(torch, content)
    return lambda tensors, sizes: constant
