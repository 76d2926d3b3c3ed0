"""``run_decompositions`` without two costs that are half of what a small model takes to capture.

torch asks the dispatcher for all composite operators once for each of its fifty namespaces; and it gives each of some six hundred
operators twenty kernels for the time of the call, with a function, and its annotations, made anew for each. Both are private to torch:
where a version has them no more, nothing is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._export.utils
from torch._C import DispatchKey
from torch._ops import OperatorBase

LIST_OPERATORS = "_materialize_cpp_cia_ops"
list_operators: Callable[[], None] | None = getattr(torch._export.utils, LIST_OPERATORS, None)
torch_py_impl = OperatorBase.py_impl


@contextlib.contextmanager
def fast_decompositions() -> Iterator[None]:
    """Make ``run_decompositions`` fast for the time of the block. Of several threads the first that ends makes the others slower."""
    if list_operators is not None:
        list_operators()  # no operator is registered meanwhile: once is enough
        setattr(torch._export.utils, LIST_OPERATORS, lambda: None)
    OperatorBase.py_impl = _py_impl
    try:
        yield
    finally:
        OperatorBase.py_impl = torch_py_impl
        if list_operators is not None:
            setattr(torch._export.utils, LIST_OPERATORS, list_operators)


def _py_impl(self: OperatorBase, key: Any) -> Callable[[Any], Any]:
    """Register a kernel as ``py_impl`` does for a dispatch key; leave everything else to torch."""
    if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in self.py_kernels:
        return torch_py_impl(self, key)

    def register(kernel):  # without annotations: they are what takes the time
        self.py_kernels[key] = kernel
        self._dispatch_cache.clear()
        return kernel

    return register
