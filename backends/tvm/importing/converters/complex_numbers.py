"""Complex numbers as pairs of real ones, (real, imaginary) in a last dimension: arithmetic, and what moves elements.

Other operators on complex numbers are decomposed or computed by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import R, aten, cast, complex_semantics
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.importing.values import stored_dtype, tensor_type
from thresher.ir.nodes import dtype_of, is_tensor, shape_of

Parts = tuple[Any, Any]  # real and imaginary, each a tensor of the shape of the value


def parts_dtype(node: fx.Node) -> str:
    """Return the dtype of the parts of a node's value."""
    return stored_dtype(dtype_of(node))


def parts(importer: Importer, value: Any, dtype: str) -> Parts:
    """Return the real and the imaginary part of an argument, a node or a number, in ``dtype``."""
    if not isinstance(value, fx.Node):
        number = complex(value)
        return relax.const(number.real, dtype), relax.const(number.imag, dtype)
    if not is_tensor(value) or not dtype_of(value).is_complex:
        return cast(importer, importer.tensor(value), dtype), relax.const(0.0, dtype)
    pair, last = cast(importer, importer.value(value), dtype), len(shape_of(value))
    halves = [importer.emit(R.strided_slice(pair, [last], [i], [i + 1])) for i in (0, 1)]
    return importer.emit(R.squeeze(halves[0], [last])), importer.emit(R.squeeze(halves[1], [last]))


def pair(importer: Importer, node: fx.Node, real: Any, imaginary: Any) -> Any:
    """Return the value of ``node`` from its parts, which are broadcast to its shape."""
    shape = relax.ShapeExpr(list(tensor_type(node.meta["val"], importer.sizes).shape.values)[:-1])
    both = [importer.emit(R.broadcast_to(part, shape)) for part in (real, imaginary)]
    return importer.emit(R.stack(both, axis=len(shape_of(node))))


@complex_semantics(aten.view_as_real.default, aten.view_as_complex.default)
def reinterpret(importer: Importer, node: fx.Node) -> Any:
    """Return the pairs, which both sides are."""
    return importer.value(node.args[0])


@complex_semantics(aten.complex.default)
def compose(importer: Importer, node: fx.Node) -> Any:
    """Return real + i imaginary."""
    dtype = parts_dtype(node)
    return pair(importer, node, *(cast(importer, importer.value(a), dtype) for a in node.args))


@complex_semantics(aten.mul.Tensor, aten.mul.Scalar)
def multiply(importer: Importer, node: fx.Node) -> Any:
    """Compute (a + ib) (c + id) = (ac - bd) + i (ad + bc)."""
    (a, b), (c, d) = (parts(importer, x, parts_dtype(node)) for x in node.args)
    real = importer.emit(R.subtract(importer.emit(R.multiply(a, c)), importer.emit(R.multiply(b, d))))
    return pair(
        importer, node, real, importer.emit(R.add(importer.emit(R.multiply(a, d)), importer.emit(R.multiply(b, c))))
    )


def _sum(operation: Callable[[Any, Any], Any]) -> Callable[[Importer, fx.Node], Any]:
    def convert(importer: Importer, node: fx.Node) -> Any:
        if argument(node, 2, "alpha", 1) != 1:
            raise NotImplementedError("a factor of a complex sum")
        first, second = (parts(importer, x, parts_dtype(node)) for x in node.args[:2])
        return pair(importer, node, *(importer.emit(operation(a, b)) for a, b in zip(first, second)))

    return convert


complex_semantics(aten.add.Tensor, aten.add.Scalar)(_sum(R.add))
complex_semantics(aten.sub.Tensor, aten.sub.Scalar)(_sum(R.subtract))


@complex_semantics(aten.neg.default)
def negative(importer: Importer, node: fx.Node) -> Any:
    """Negate both parts."""
    return importer.emit(R.negative(importer.value(node.args[0])))


@complex_semantics(aten._conj.default, aten.conj_physical.default)
def conjugate(importer: Importer, node: fx.Node) -> Any:
    """Negate the imaginary part."""
    real, imaginary = parts(importer, node.args[0], parts_dtype(node))
    return pair(importer, node, real, importer.emit(R.negative(imaginary)))


@complex_semantics(aten.abs.default)
def magnitude(importer: Importer, node: fx.Node) -> Any:
    """Compute the magnitude as the larger part times sqrt(1 + ratio^2), which does not overflow."""
    real, imaginary = parts(importer, node.args[0], parts_dtype(node))

    def compute(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        return te.compute(a.shape, lambda *i: _hypotenuse(a(*i), b(*i)), name="T_elementwise")

    return importer.emit_te("magnitude", compute, real, imaginary)


def _hypotenuse(a: Any, b: Any) -> Any:
    one, zero = tirx.const(1.0, a.ty.dtype), tirx.const(0.0, a.ty.dtype)
    large, small = te.max(te.abs(a), te.abs(b)), te.min(te.abs(a), te.abs(b))
    ratio = small / tirx.Select(large == zero, one, large)
    return large * te.sqrt(one + ratio * ratio)


@complex_semantics(aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)
def same(importer: Importer, node: fx.Node) -> Any:
    """Return the value itself."""
    return importer.value(node.args[0])


@complex_semantics(
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.squeeze.dim, aten.unsqueeze.default
)
def reshape(importer: Importer, node: fx.Node) -> Any:
    """Return the elements in another shape; the pairs stay together."""
    return importer.emit(R.reshape(importer.value(node.args[0]), tensor_type(node.meta["val"], importer.sizes).shape))


@complex_semantics(aten.expand.default)
def expand(importer: Importer, node: fx.Node) -> Any:
    """Repeat along dimensions of size 1."""
    return importer.emit(
        R.broadcast_to(importer.value(node.args[0]), tensor_type(node.meta["val"], importer.sizes).shape)
    )


@complex_semantics(aten.permute.default)
def permute(importer: Importer, node: fx.Node) -> Any:
    """Exchange dimensions; the pairs stay last."""
    rank = len(shape_of(node))
    return importer.emit(R.permute_dims(importer.value(node.args[0]), [*(d % rank for d in node.args[1]), rank]))


@complex_semantics(aten.transpose.int)
def transpose(importer: Importer, node: fx.Node) -> Any:
    """Exchange two dimensions."""
    rank = len(shape_of(node))
    order = list(range(rank + 1))
    first, second = (d % rank for d in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return importer.emit(R.permute_dims(importer.value(node.args[0]), order))


@complex_semantics(aten.slice.Tensor)
def slice_of(importer: Importer, node: fx.Node) -> Any:
    """Return a range of one dimension, of a size that is known."""
    size = shape_of(node.args[0])[argument(node, 1, "dim", 0)]
    if not isinstance(size, int):
        raise NotImplementedError("a slice of a dynamic dimension")
    ends = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    if any(isinstance(end, fx.Node) for end in ends):
        raise NotImplementedError("a slice whose ends the data decide")
    start, end, step = slice(*ends).indices(size)
    dim = argument(node, 1, "dim", 0) % len(shape_of(node))
    return importer.emit(R.strided_slice(importer.value(node.args[0]), [dim], [start], [end], [step]))


@complex_semantics(aten.select.int)
def select(importer: Importer, node: fx.Node) -> Any:
    """Return one index of a dimension."""
    source, dim, index = node.args
    size, dim = shape_of(source)[dim], dim % len(shape_of(source))
    if not isinstance(size, int) or not isinstance(index, int):
        raise NotImplementedError("an index or a size that is not known")
    index %= size
    return importer.emit(
        R.squeeze(importer.emit(R.strided_slice(importer.value(source), [dim], [index], [index + 1])), [dim])
    )


@complex_semantics(aten.cat.default)
def concatenate(importer: Importer, node: fx.Node) -> Any:
    """Concatenate along a dimension."""
    dtype, dim = parts_dtype(node), argument(node, 1, "dim", 0) % len(shape_of(node))
    if not all(dtype_of(n).is_complex and len(shape_of(n)) == len(shape_of(node)) for n in node.args[0]):
        raise NotImplementedError("real and complex values together")
    return importer.emit(R.concat([cast(importer, importer.value(n), dtype) for n in node.args[0]], dim))
