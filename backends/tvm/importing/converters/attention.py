"""Attention, dense and over lists of blocks: fused on the CPU and, in half precision, on tensor cores; composed elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from thresher.analysis.slices.transfer.base import argument
from thresher.backends.tvm.importing.converters.registry import (
    R,
    aten,
    before_swap,
    cast,
    cpu_kernel,
    ops,
    result_dtype,
    semantics,
    sizes,
)
from thresher.backends.tvm.importing.converters.small_weights import large_blocks
from thresher.backends.tvm.importing.importer import Importer
from thresher.backends.tvm.kernels.cpu import attention, streamed_attention
from thresher.backends.tvm.kernels.cuda import flash_attention
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ops.sparse_attention import arguments


@dataclass(frozen=True)
class Call:
    """The arguments of one attention, the shapes of q, k and v as [B, H, L, E]; ``mask`` has four dimensions and may be None."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    shapes: tuple[list[int], list[int], list[int]]
    lists: tuple[fx.Node, fx.Node] | None = None
    block_q: int = streamed_attention.BLOCK
    block_k: int = streamed_attention.BLOCK
    softcap: float | None = None
    skip: float | None = None

    @staticmethod
    def of(node: fx.Node) -> Call | None:
        """Return the arguments of a node; None where dimensions are dynamic, or broadcast, or those of blocks not three or four."""
        q, k, v = node.args[:3]
        rank = len(shape_of(q))
        if any(not isinstance(d, int) for n in (q, k, v) for d in shape_of(n)):
            return None
        shapes = [sizes(n) for n in (q, k, v)]
        if any(len(s) != rank for s in shapes) or any(s[:-3] != shapes[0][:-3] for s in shapes):
            return None
        inputs = (_four(shapes[0]), _four(shapes[1]), _four(shapes[2]))
        if inputs[0][1] % inputs[1][1] or (rank == 3 and inputs[0][1] != inputs[1][1]):
            return None
        if node.target is ops.sparse_attention.default:
            if rank not in (3, 4):  # lists of blocks have no other dimensions
                return None
            _, _, _, mask, blocks, counts, block_q, block_k, scale, causal, softcap, skip = arguments(node)
            lists = None if blocks is None else (blocks, counts)
            return Call(q, k, v, mask, causal, scale, inputs, lists, block_q, block_k, softcap, skip)
        mask = argument(node, 3, "attn_mask")
        if is_tensor(mask) and math.prod(lead := _lead(mask, rank)) > 1 and lead != shapes[0][:-3]:
            return None
        scale = argument(node, 6, "scale")
        scale = 1.0 / math.sqrt(shapes[0][-1]) if scale is None else float(scale)
        return Call(q, k, v, mask, bool(argument(node, 5, "is_causal", False)), scale, inputs)

    def values(self, importer: Importer) -> list[Any]:
        """Return q, k and v with four dimensions."""
        tensors = [importer.value(n) for n in (self.q, self.k, self.v)]
        if len(shape_of(self.q)) == 4:
            return tensors
        return [importer.emit(R.reshape(t, s)) for t, s in zip(tensors, self.shapes)]

    def mask_value(self, importer: Importer) -> Any:
        """Return the mask with four dimensions, boolean or float32; None without a mask."""
        if self.mask is None:
            return None
        m = importer.value(self.mask)
        m = importer.emit(R.reshape(m, self.mask_shape))
        return m if str(m.ty.dtype) == "bool" else cast(importer, m, "float32")

    @property
    def blocked(self) -> bool:
        """True where results depend on the borders of blocks: some are not listed, or are skipped."""
        return self.lists is not None or self.skip is not None

    @property
    def mask_shape(self) -> list[int]:
        """The shape of the mask with four dimensions."""
        assert self.mask is not None
        return _four(sizes(self.mask))


def _four(shape: list[int]) -> list[int]:
    """Return a shape with four dimensions, those before the heads as one: the batch; without any, or without heads, they are 1."""
    padded = [1] * (4 - len(shape)) + shape
    return [math.prod(padded[:-3]), *padded[-3:]]


def _lead(mask: fx.Node, rank: int) -> list[int]:
    """Return the sizes of a mask before the heads, beside queries of ``rank`` dimensions."""
    return ([1] * (rank - len(shape_of(mask))) + list(shape_of(mask)))[:-3]


@cpu_kernel(aten.scaled_dot_product_attention.default)
def attention_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute attention in one pass over the keys; with few queries, which do not fill a register, row by row."""
    call, machine = Call.of(node), importer.cpu
    if call is None:
        return attention_composed(importer, node)
    if call.shapes[0][2] >= machine.lanes:
        return streamed(importer, node, call)
    out = importer.emit_te(
        "attention",
        lambda q, k, v, m: attention.attention(q, k, v, m, call.scale, call.causal, machine),
        *call.values(importer),
        call.mask_value(importer),
    )
    return out if len(shape_of(node)) == 4 else importer.emit(R.reshape(out, sizes(node)))


@cpu_kernel(ops.sparse_attention.default)
def sparse_attention_kernel(importer: Importer, node: fx.Node) -> Any:
    """Compute attention in one pass over the listed blocks of keys."""
    call = Call.of(node)
    if call is None or (call.blocked and call.block_q % importer.cpu.lanes):
        return sparse_attention_composed(importer, node)
    return streamed(importer, node, call)


def streamed(importer: Importer, node: fx.Node, call: Call) -> Any:
    """Emit the kernel that computes one pass over the keys.

    It reads heads inside the tokens as they are stored, and writes them so where the only user transposes the result.
    """
    machine = importer.cpu
    values, (q, k, v) = as_stored(importer, (call.q, call.k, call.v), call.values(importer), call.shapes)
    user = next(iter(node.users)) if len(node.users) == 1 else None
    inside = is_tensor(user) and len(shape_of(node)) == 4 and before_swap(user, 1, 2) is node
    lists = [] if call.lists is None else [importer.value(n) for n in call.lists]
    problem = streamed_attention.Problem(
        q, k, v, inside, call.scale, call.causal,
        lists=None if call.lists is None else tuple(sizes(call.lists[0])), block_q=call.block_q,
        block_k=call.block_k if call.blocked else streamed_attention.block_of(call.shapes[1][2]), softcap=call.softcap, skip=call.skip,
    )  # fmt: skip
    mask = [] if call.mask is None else [added_by_key(importer, call, streamed_attention.tile_of(problem, machine))]
    if mask:
        problem = replace(problem, mask=tuple(int(d) for d in mask[0].ty.shape))
    function = importer.builder.add_func(streamed_attention.kernel(problem, machine), "attention")
    kind = relax.TensorType(problem.result.stored, "float32")
    out = importer.emit(relax.call_tir(function, [*values, *mask, *lists], kind))
    if inside:
        importer.env[user] = out
        importer.as_user.add(node)
        return out
    return out if len(shape_of(node)) == 4 else importer.emit(R.reshape(out, sizes(node)))


def as_stored(
    importer: Importer, nodes: Sequence[fx.Node], values: Sequence[Any], shapes: Sequence[Sequence[int]]
) -> tuple[list[Any], list[streamed_attention.Operand]]:
    """Return [B, H, L, E] values, those that are a view of [B, L, H, E] as they are stored, and how each is stored."""
    stored, operands = [], []
    for node, value, shape in zip(nodes, values, shapes):
        source = before_swap(node, 1, 2) if len(shape_of(node)) == 4 else None
        stored.append(value if source is None else importer.value(source))
        b, h, rows, width = shape
        operands.append(streamed_attention.Operand((b, h, rows, width), source is not None))
    return stored, operands


def added_by_key(importer: Importer, call: Call, tile: int) -> Any:
    """Return the mask as numbers to add, [b, h, keys, queries] in whole tiles of queries; a dimension of 1 stays."""
    shape = call.mask_shape
    columns = -(-shape[2] // tile) * tile if shape[2] > 1 else 1
    if importer.is_constant(call.mask):
        array = importer.array(call.mask).reshape(shape)
        added = np.where(array, 0.0, streamed_attention.MASKED) if array.dtype == bool else array
        added = np.pad(added.astype(np.float32), ((0, 0), (0, 0), (0, columns - shape[2]), (0, 0)))
        return importer.weight(np.ascontiguousarray(added.swapaxes(2, 3)), (call.mask, "by key", tile))

    def element(m: te.Tensor) -> te.Tensor:
        def one(b: Any, h: Any, s: Any, i: Any) -> Any:
            value = m[b, h, te.min(i, shape[2] - 1), s]
            allowed, masked = (tirx.const(v, "float32") for v in (0.0, streamed_attention.MASKED))
            return tirx.Select(value, allowed, masked) if m.dtype == "bool" else value

        return te.compute((*shape[:2], shape[3], columns), one, name="added_by_key")

    return importer.emit_te("added_by_key", element, call.mask_value(importer))


@semantics(aten.scaled_dot_product_attention.default)
def attention_elsewhere(importer: Importer, node: fx.Node) -> Any:
    """Compute attention in half precision on a GPU with tensor cores in one kernel, and composed elsewhere."""
    call = Call.of(node)
    if call is None or not flash_attention.fits(importer.target.arch, result_dtype(node), call.shapes):
        return attention_composed(importer, node)
    return on_tensor_cores(importer, node, call)


def on_tensor_cores(importer: Importer, node: fx.Node, call: Call) -> Any:
    """Emit the kernel for tensor cores; q, k and v are read with the strides with which they are stored."""
    values, operands = [], []
    for operand, value, shape in zip((call.q, call.k, call.v), call.values(importer), call.shapes):
        source = before_swap(operand, 1, 2) if len(shape_of(operand)) == 4 else None  # stored as [B, L, H, E]
        values.append(value if source is None else importer.value(source))
        operands.append(flash_attention.Operand.of(shape, source is not None))
    mask, kind, mask_operand = call.mask_value(importer), "NONE", None
    if mask is not None:
        kind = "BOOLEAN" if str(mask.ty.dtype) == "bool" else "ADDED"
        mask_operand = flash_attention.Operand.mask(call.mask_shape)
    q, k, v = operands
    lists = (None, None) if call.lists is None else tuple(map(importer.value, call.lists))
    problem = flash_attention.Problem(
        q, k, v, mask_operand, kind, call.causal, call.scale, result_dtype(node), call.softcap,
        None if call.lists is None else tuple(sizes(call.lists[0])), call.block_q, call.block_k, call.skip,
    )  # fmt: skip
    compute = partial(flash_attention.attention, problem)
    out = importer.emit_te("flash_attention", compute, *values, mask, *lists, scheduled=True)
    return out if len(shape_of(node)) == 4 else importer.emit(R.reshape(out, sizes(node)))


@semantics(ops.sparse_attention.default)
def sparse_attention_elsewhere(importer: Importer, node: fx.Node) -> Any:
    """Skip blocks that are not listed, or of small weights, on tensor cores; composed elsewhere."""
    call, dtype = Call.of(node), result_dtype(node)
    if call is None:
        return sparse_attention_composed(importer, node)
    blocks = (call.block_q, call.block_k) if call.blocked else (flash_attention.ROWS, flash_attention.ROWS)
    if not flash_attention.fits(importer.target.arch, dtype, call.shapes, *blocks, call.skip is not None):
        return sparse_attention_composed(importer, node)
    return on_tensor_cores(importer, node, call)


def sparse_attention_composed(importer: Importer, node: fx.Node) -> Any:
    """Compute dense attention with a mask for what is not listed, or of small weights: right, but nothing is saved."""
    _, _, _, mask, blocks, counts, block_q, block_k, scale, causal, softcap, skip = arguments(node)
    listed = []
    if blocks is not None:
        rows, keys = sizes(node)[2], sizes(node.args[1])[2]

        def allowed(b: te.Tensor, n: te.Tensor) -> te.Tensor:
            c = te.reduce_axis((0, b.shape[3]), name="c")

            def one(*i: Any) -> Any:
                row = (*i[:2], i[2] // block_q)
                entry = te.all(c < n[row], b[(*row, c)] == i[3] // block_k)
                return te.max(tirx.Cast("int32", entry), axis=c)

            return te.compute((*b.shape[:2], rows, keys), one, name="allowed")

        listed = [cast(importer, importer.emit_te("allowed", allowed, *map(importer.value, (blocks, counts))), "bool")]
    small = None if skip is None else partial(large_blocks, importer, skip, block_q, block_k)
    return composed(importer, node, mask, causal, scale, softcap, listed, small)


def attention_composed(importer: Importer, node: fx.Node) -> Any:
    """Compute attention of any rank, with grouped heads and dynamic shapes."""
    scale = argument(node, 6, "scale")
    scale = 1.0 / math.sqrt(int(shape_of(node.args[0])[-1])) if scale is None else float(scale)
    return composed(importer, node, argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False)), scale)


def composed(
    importer: Importer,
    node: fx.Node,
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    allowed: Sequence[Any] = (),
    large: Callable[[Any], Any] | None = None,
) -> Any:
    """Return softmax(cap(scale q k^T) + mask) v, the softmax in float32 or wider.

    ``mask`` is boolean or additive; ``allowed`` are more boolean masks, and ``large`` computes one from the scores.
    """
    q, k, v = (importer.value(n) for n in node.args[:3])
    rank = len(shape_of(node))
    heads, kv_heads = (shape_of(n)[-3] if rank > 2 else 1 for n in node.args[:2])
    if heads != kv_heads:
        k, v = (importer.emit(R.repeat(t, heads // kv_heads, rank - 3)) for t in (k, v))
    dtype = result_dtype(node)
    order = [*range(rank - 2), rank - 1, rank - 2]
    wide = "float64" if dtype == "float64" else "float32"
    scores = importer.emit(R.matmul(q, importer.emit(R.permute_dims(k, order)), out_dtype=wide))
    scores = importer.emit(R.multiply(scores, relax.const(scale, wide)))
    if softcap is not None:
        scores = importer.emit(R.tanh(importer.emit(R.divide(scores, relax.const(softcap, wide)))))
        scores = importer.emit(R.multiply(scores, relax.const(softcap, wide)))
    low = relax.const(float(np.finfo(wide).min) / 2, wide)
    if mask is not None:
        m = importer.value(mask)
        if str(m.ty.dtype) == "bool":
            allowed = [*allowed, m]
        else:
            scores = importer.emit(R.add(scores, cast(importer, m, wide)))
    if causal:
        length, keys = (int(shape_of(n)[-2]) for n in node.args[:2])
        below = np.tril(np.ones((length, keys), bool))
        allowed = [*allowed, importer.weight(below, ("causal", length, keys))]
    for m in allowed:
        scores = importer.emit(R.where(m, scores, low))
    if large is not None:
        scores = importer.emit(R.where(large(scores), scores, low))
    weights = cast(importer, importer.emit(R.nn.softmax(scores, -1)), dtype)
    return cast(importer, importer.emit(R.matmul(weights, v, out_dtype=wide)), dtype)
