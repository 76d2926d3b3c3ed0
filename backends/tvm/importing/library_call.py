"""The call of an operator of torch from compiled code: the half that is emitted. :mod:`thresher.backends.tvm.library` is the other.

Any operator of ATen, and any that is registered with ``torch.library``, can be called so: with all dtypes, several results, and results
whose sizes are not known before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sympy
import torch
import tvm
from torch import Tensor, fx
from tvm import relax

from thresher.backends.tvm.importing.sizes import SYMBOLIC, Sizes, symbols
from thresher.backends.tvm.importing.values import rank_type, tensor_type
from thresher.backends.tvm.library import CALL
from thresher.ir.nodes import is_tensor

aten = torch.ops.aten
#: Operators whose result depends on the strides of the argument; compiled code hands over contiguous memory.
OF_MEMORY = (aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default)


def library_call(node: fx.Node, tensor: Callable[[fx.Node], Any], sizes: Sizes, device: str) -> relax.Call:
    """Return the call that computes ``node``, whose value is its result or the tuple of its results.

    Args:
        node: a call of an operator of torch's.
        tensor: returns the Relax expression of an argument.
        sizes: those that are known.
        device: ``cpu`` or ``cuda``, where operators without tensors make theirs.

    Raises:
        NotImplementedError: it calls something else, or has an argument that cannot be written.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise NotImplementedError(f"{node.target} is no operator of torch's")
    if node.target in OF_MEMORY and not node.args[0].meta["val"].is_contiguous():
        raise NotImplementedError(
            "it reads memory by strides, and its argument is not contiguous: call .contiguous() before it"
        )
    arguments = _Arguments(tensor, sizes, device)
    text = json.dumps(
        [str(node.target), node.name, arguments.write(list(node.args)), {"kwargs": arguments.keywords(node)}]
    )
    kind = _type(node.meta["val"], sizes, arguments.symbols)
    return relax.call_pure_packed(
        CALL, tvm.ir.StringImm(text), relax.ShapeExpr(arguments.sizes), *arguments.tensors, ty_args=[kind]
    )


def _type(value: Any, sizes: Sizes, known: set[sympy.Symbol]) -> Any:
    """Return the type of a result. Its sizes are those that ``known`` symbols decide; others are read from the result itself.

    They are read even where another result has them, too: TVM may compute this one first.
    """
    if isinstance(value, (tuple, list)):
        return relax.TupleType([_type(v, sizes, known) for v in value])
    if value is None:
        return relax.TensorType([0], "float32")
    if not isinstance(value, Tensor):
        raise NotImplementedError(f"its result is a {type(value).__name__}")
    return tensor_type(value, sizes) if symbols(value.shape) <= known else rank_type(value)


class _Arguments:
    """The arguments of a call as they are written: tensors, sizes and texts apart."""

    def __init__(self, tensor: Callable[[fx.Node], Any], known: Sizes, device: str):
        self.tensor, self.known, self.device = tensor, known, device
        self.tensors: list[Any] = []
        self.sizes: list[Any] = []
        self.written: dict[fx.Node, int] = {}
        self.symbols: set[sympy.Symbol] = set()

    def keywords(self, node: fx.Node) -> dict[str, Any]:
        """Return the keyword arguments; the device is that of the target."""
        kept = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        written = {k: self.write(v) for k, v in kept.items()}
        return written | ({"device": self.device} if "device" in node.kwargs else {})

    def write(self, value: Any) -> Any:
        """Return ``value`` as JSON holds it."""
        if isinstance(value, fx.Node):
            return self._node(value)
        if isinstance(value, (tuple, list)):
            return [self.write(v) for v in value]
        if isinstance(value, SYMBOLIC):
            return self._size(value)
        if isinstance(value, complex):
            return {"number": [value.real, value.imag]}
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return {"constant": str(value).removeprefix("torch.")}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise NotImplementedError(f"an argument is a {type(value).__name__}")

    def _node(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not is_tensor(node) and not isinstance(value, SYMBOLIC):
            raise NotImplementedError(f"its argument {node.name} is a {type(value).__name__}")
        if node not in self.written:
            self.written[node] = len(self.tensors)
            self.symbols |= symbols(value.shape) if isinstance(value, Tensor) else set()
            self.tensors.append(self.tensor(node))
        kind = "item" if isinstance(value, SYMBOLIC) else "complex" if value.is_complex() else "tensor"
        return {kind: self.written[node]}

    def _size(self, value: Any) -> Any:
        self.symbols |= symbols([value])
        self.sizes.append(self.known.expression(value))
        return {"size": len(self.sizes) - 1}
