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

LIST = "_materialize_cpp_cia_ops"
list_operators: Callable[[], None] | None = getattr(torch._export.utils, LIST, None)
give_kernel = OperatorBase.py_impl


@contextlib.contextmanager
def fast_decompositions() -> Iterator[None]:
    """For the time of the block. In several threads at once the first that ends makes the others slower, no more."""
    if list_operators is not None:
        list_operators()  # no operator is registered meanwhile: once is enough
        setattr(torch._export.utils, LIST, lambda: None)
    OperatorBase.py_impl = _give_kernel
    try:
        yield
    finally:
        OperatorBase.py_impl = give_kernel
        if list_operators is not None:
            setattr(torch._export.utils, LIST, list_operators)


def _give_kernel(self: OperatorBase, key: Any) -> Callable[[Any], Any]:
    """What ``py_impl`` does for a dispatch key; everything else is torch's."""
    if not isinstance(key, DispatchKey) or key == DispatchKey.Python or key in self.py_kernels:
        return give_kernel(self, key)

    def give(kernel):  # without annotations: they are what takes the time
        self.py_kernels[key] = kernel
        self._dispatch_cache.clear()
        return kernel

    return give
