"""The operators of ``torch.ops.prims``, which torch's references of ATen operators end in.

Those that TVM's converters know under the same name (``prims.sin``) are converted by them; here is what has another name or other
arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from tvm import relax

from thresher.backends.tvm.importing.converters.registry import SEMANTICS, R, aten, cast, result_dtype, semantics
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.values import tensor_type

prims = torch.ops.prims

#: Operators with the arguments of one of ATen.
SAME_ARGUMENTS = {
    "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor, "eq": aten.eq.Tensor,
    "ne": aten.ne.Tensor, "lt": aten.lt.Tensor, "le": aten.le.Tensor, "gt": aten.gt.Tensor, "ge": aten.ge.Tensor,
    "cat": aten.cat.default, "convert_element_type": aten._to_copy.default, "squeeze": aten.squeeze.dims,
}  # fmt: skip
for _name, _operator in SAME_ARGUMENTS.items():
    SEMANTICS[getattr(prims, _name).default] = SEMANTICS[_operator]

#: Reductions over the dimensions that are listed.
REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": R.sum, "prod": R.prod}


def _reduction(operation: Callable[..., Any]) -> Callable[[Importer, fx.Node], Any]:
    def convert(importer: Importer, node: fx.Node) -> Any:
        x = cast(importer, importer.value(node.args[0]), result_dtype(node))
        return importer.emit(operation(x, list(node.args[1]))) if node.args[1] else x

    return convert


for _name, _operation in REDUCTIONS.items():
    SEMANTICS[getattr(prims, _name).default] = _reduction(_operation)


@semantics(prims.reshape.default, prims.collapse_view.default, prims.split_dim.default)
def reshape(importer: Importer, node: fx.Node) -> Any:
    """Return the elements in another shape."""
    return importer.emit(R.reshape(importer.value(node.args[0]), tensor_type(node.meta["val"], importer.sizes).shape))


@semantics(prims.broadcast_in_dim.default)
def broadcast_in_dim(importer: Importer, node: fx.Node) -> Any:
    """Put the dimensions of the argument at the indices that are listed, and repeat along the others."""
    x, _, dims = node.args
    shape = list(tensor_type(node.meta["val"], importer.sizes).shape.values)
    sizes = list(tensor_type(x.meta["val"], importer.sizes).shape.values)
    aligned = [sizes[dims.index(d)] if d in dims else 1 for d in range(len(shape))]
    return importer.emit(R.broadcast_to(importer.emit(R.reshape(importer.value(x), aligned)), relax.ShapeExpr(shape)))


@semantics(prims.transpose.default)
def transpose(importer: Importer, node: fx.Node) -> Any:
    """Exchange dimensions."""
    return importer.emit(R.permute_dims(importer.value(node.args[0]), list(node.args[1])))


@semantics(prims.rev.default)
def reverse(importer: Importer, node: fx.Node) -> Any:
    """Return the elements in the other order along dimensions."""
    value = importer.value(node.args[0])
    for dim in node.args[1]:
        value = importer.emit(R.flip(value, dim))
    return value


@semantics(prims.where.default)
def where(importer: Importer, node: fx.Node) -> Any:
    """Return the first value where a condition holds, else the second."""
    condition, a, b = node.args
    dtype = result_dtype(node)
    return importer.emit(
        R.where(importer.tensor(condition), *(cast(importer, importer.value(v), dtype) for v in (a, b)))
    )


@semantics(prims.view_of.default, prims.device_put.default, aten.alias.default, aten.detach.default)
def same(importer: Importer, node: fx.Node) -> Any:
    """Return the value itself."""
    return importer.value(node.args[0])


@semantics(
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty_strided.default,
    aten.empty_permuted.default,
)
def empty(importer: Importer, node: fx.Node) -> Any:
    """Return zeros: what is not initialised may be anything."""
    kind = tensor_type(node.meta["val"], importer.sizes)
    return importer.emit(R.zeros(kind.shape, str(kind.dtype)))
