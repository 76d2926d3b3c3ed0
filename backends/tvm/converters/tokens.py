"""Token reduction: on the CPU in float32."""

from __future__ import annotations

from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.backends.tvm.converters.registry import cpu_kernel, ops, result_dtype, semantics, sizes
from thresher.backends.tvm.importer import Importer
from thresher.backends.tvm.kernels import tokens


def _call(importer: Importer, name: str, function: tirx.PrimFunc, node: fx.Node, inputs: int, kinds: Any) -> Any:
    target = importer.builder.add_func(function, name)
    return importer.emit(relax.call_tir(target, [importer.value(n) for n in node.args[:inputs]], kinds))


@cpu_kernel(ops.match_tokens.default)
@semantics(ops.match_tokens.default)
def match_tokens(importer: Importer, node: fx.Node) -> Any:
    """Two values, which ``getitem`` takes apart."""
    _on_cpu(importer, node)
    *_, count, drop = node.args
    batch, n = sizes(node.args[1])
    kinds = [relax.TensorType((batch, n), "int64"), relax.TensorType((batch, n - count), "float32")]
    return _call(importer, "match_tokens", tokens.match(batch, n, count, drop), node, 3, kinds)


@cpu_kernel(ops.token_sides.default)
@semantics(ops.token_sides.default)
def token_sides(importer: Importer, node: fx.Node) -> Any:
    _on_cpu(importer, node)
    batch, n = sizes(node)
    function = tokens.sides(batch, n, *node.args[2:])
    return _call(importer, "token_sides", function, node, 2, relax.TensorType((batch, n), "int64"))


@cpu_kernel(ops.reduce_tokens.default)
@semantics(ops.reduce_tokens.default)
def reduce_tokens(importer: Importer, node: fx.Node) -> Any:
    _on_cpu(importer, node)
    batch, count, channels = sizes(node)
    function = tokens.reduce(batch, sizes(node.args[0])[1], channels, count, importer.cpu.lanes)
    return _call(importer, "reduce_tokens", function, node, 3, relax.TensorType((batch, count, channels), "float32"))


@semantics(ops.restore_tokens.default)
def restore_tokens(importer: Importer, node: fx.Node) -> Any:
    """A gather along one dimension."""
    dim, shape = node.args[2], sizes(node)

    def restored(x: te.Tensor, assign: te.Tensor) -> te.Tensor:
        def element(*i: Any) -> Any:
            slot = assign[i[0], i[dim]]
            place = (*i[:dim], te.max(slot, tirx.const(0, "int64")), *i[dim + 1 :])
            return tirx.Select(slot >= 0, x[place], tirx.const(0, x.dtype))

        return te.compute(shape, element, name="restored")

    return importer.emit_te("restore_tokens", restored, *map(importer.value, node.args[:2]))


def _on_cpu(importer: Importer, node: fx.Node) -> None:
    floats = [n for n in (node, *node.all_input_nodes) if "float" in _dtype(n)]
    if importer.machine is None or any(_dtype(n) != "float32" for n in floats):
        raise NotImplementedError("tokens are reduced in float32 on the CPU only")


def _dtype(node: fx.Node) -> str:
    value = node.meta["val"]
    return "" if isinstance(value, (tuple, list)) else result_dtype(node)
