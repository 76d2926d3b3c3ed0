"""Torch's own kernels (oneDNN, MKL) as candidates: an operator that torch computes, called from the compiled code.

They are taken only where tuning found one faster, with ``library="auto"``, and only for operators with arithmetic: the call costs
several microseconds, and what follows is no longer part of the kernel. Code with such calls needs torch where it runs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import tvm
import tvm_ffi
from torch import fx
from tvm import relax

import thresher.ops  # noqa: F401  (registers the operators that a call may name)
from thresher.analysis.cost.cost import COUNTERS
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.runtime.tensor_spec import dtype_name

CALL = "thresher.library"


def possible(node: fx.Node) -> bool:
    """Return whether torch may compute ``node``: arithmetic on float32 of known shapes."""
    tensors = [node, *node.all_input_nodes]
    return (
        node.target in COUNTERS
        and all(is_tensor(t) and all(isinstance(d, int) for d in shape_of(t)) for t in tensors)
        and dtype_of(node) is torch.float32
    )


def emit(importer: Any, node: fx.Node) -> Any:
    """Emit the call: the operator and its literals as text, then its tensors."""
    sources = node.all_input_nodes

    def word(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"tensor": sources.index(value)}
        return [word(v) for v in value] if isinstance(value, (list, tuple)) else value

    arguments = [word(a) for a in node.args], {k: word(v) for k, v in node.kwargs.items()}
    text = json.dumps([str(node.target), *arguments])
    kind = relax.TensorType(list(shape_of(node)), dtype_name(dtype_of(node)))
    tensors = [importer.value(s) for s in sources]
    return importer.emit(relax.call_pure_packed(CALL, tvm.ir.StringImm(text), *tensors, ty_args=[kind]))


@tvm_ffi.register_global_func(CALL, override=True)
def call(text: str, *tensors: Any) -> Any:
    """Compute an operator by torch; compiled code calls this by its registered name."""
    result = _parsed(text)([torch.from_dlpack(t) for t in tensors])
    return tvm_ffi.from_dlpack(result.contiguous())


@functools.cache
def _parsed(text: str) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    name, args, kwargs = json.loads(text)
    namespace, operator, overload = name.split(".")
    target = getattr(getattr(getattr(torch.ops, namespace), operator), overload)

    def value(word: Any, tensors: list[torch.Tensor]) -> Any:
        if isinstance(word, dict):
            return tensors[word["tensor"]]
        return [value(w, tensors) for w in word] if isinstance(word, list) else word

    return lambda tensors: target(
        *(value(a, tensors) for a in args), **{k: value(v, tensors) for k, v in kwargs.items()}
    )
