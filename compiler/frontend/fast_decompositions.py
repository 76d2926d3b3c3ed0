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


COLLECT, OVERRIDE = "_collect_all_valid_cia_ops", "_override_composite_implicit_decomp"
PLACES = (
    (_export.utils, "_materialize_cpp_cia_ops"), (export.exported_program, COLLECT), (export.decomp_utils, COLLECT),
    (export.exported_program, OVERRIDE),
)  # fmt: skip
#: As torch has them, whatever block is entered meanwhile.
ORIGINALS = [(module, name, getattr(module, name)) for module, name in PLACES if hasattr(module, name)]


@contextlib.contextmanager
def fast_decompositions() -> Iterator[None]:
    """Make ``run_decompositions`` fast for the time of the block. Of several threads the first that ends makes the others slower."""
    once = functools.cache(functools.cache)  # no operator is registered meanwhile; both modules have the same list
    for module, name, original in ORIGINALS:
        setattr(module, name, _of_others(original) if name == OVERRIDE else once(original))
    try:
        yield
    finally:
        for module, name, original in ORIGINALS:
            setattr(module, name, original)


def _of_others(override: Callable[[Mapping], Any]) -> Callable[[Mapping], Any]:
    """Return the function as one that leaves operators alone which are decomposed as torch does anyway."""
    return lambda table: override({op: kernel for op, kernel in table.items() if not _is_default(op, kernel)})


def _is_default(op: OperatorBase, kernel: Any) -> bool:
    in_cpp = isinstance(kernel, functools.partial) and kernel.func.__name__ == "_special_op_to_decompose_cia"
    return in_cpp or op.py_kernels.get(COMPOSITE) is kernel
