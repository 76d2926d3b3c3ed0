"""``run_decompositions`` without the costs that are most of what a small model takes to capture.

Composite operators are those that torch itself computes by others. For each call torch lists them, once for each of its fifty
namespaces and that three times, and gives each of some six hundred of them twenty-one kernels for the time of the call: those that
decompose them as torch does anyway, too. All of this is private to torch: where a version has it no more, nothing is replaced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import _export, export
from torch._C import DispatchKey
from torch._ops import OperatorBase

COMPOSITE = DispatchKey.CompositeImplicitAutograd


@contextlib.contextmanager
def fast_decompositions() -> Iterator[None]:
    """Make ``run_decompositions`` fast for the time of the block. Of several threads the first that ends makes the others slower."""
    once = functools.cache(functools.cache)  # no operator is registered meanwhile; both modules have the same list
    with contextlib.ExitStack() as stack:
        _replace(stack, _export.utils, "_materialize_cpp_cia_ops", once)
        for module in (export.exported_program, export.decomp_utils):
            _replace(stack, module, "_collect_all_valid_cia_ops", once)
        _replace(stack, export.exported_program, "_override_composite_implicit_decomp", _of_others)
        yield


def _replace(stack: contextlib.ExitStack, module: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put what is made from a function of a module in its place until the stack is left."""
    original = getattr(module, name, None)
    if original is not None:
        setattr(module, name, make(original))
        stack.callback(setattr, module, name, original)


def _of_others(override: Callable[[Mapping], Any]) -> Callable[[Mapping], Any]:
    """Return the function as one that leaves operators alone which are decomposed as torch does anyway."""
    return lambda table: override({op: kernel for op, kernel in table.items() if not _is_default(op, kernel)})


def _is_default(op: OperatorBase, kernel: Any) -> bool:
    in_cpp = isinstance(kernel, functools.partial) and kernel.func.__name__ == "_special_op_to_decompose_cia"
    return in_cpp or op.py_kernels.get(COMPOSITE) is kernel
