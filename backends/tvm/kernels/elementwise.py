"""Elementwise kernels of several arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from tvm import te, tirx, topi


def broadcast(name: str, element: Callable[..., Any], *operands: Any) -> te.Tensor:
    """Return ``element`` of the operands, tensors that are broadcast to each other, and numbers; ``name``: of the stage."""
    tensors = [x for x in operands if isinstance(x, te.Tensor)]
    shape = tensors[0].shape if len(tensors) == 1 else reduce(topi.equal, tensors).shape

    def at(x: Any, index: tuple[Any, ...]) -> Any:
        if not isinstance(x, te.Tensor):
            return x
        places = index[len(index) - len(x.shape) :]
        return x(*(tirx.const(0, "int64") if _is_one(d) else p for d, p in zip(x.shape, places)))

    loops = [f"ax{d}" for d in range(len(shape))]
    return te.compute(shape, lambda *i: element(*(at(x, i) for x in operands)), name, varargs_names=loops)


def _is_one(size: Any) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 1
