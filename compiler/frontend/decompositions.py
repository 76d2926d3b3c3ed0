"""The operators that a captured graph is made of: ATen after decomposition, except for those that passes and kernels know as a whole."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, OutputKind

from thresher.errors import CaptureError
from thresher.frontend.fast_decompositions import fast_decompositions
from thresher.frontend.routed_experts import grouped_products
from thresher.runtime.memory import shared_pair

aten = torch.ops.aten
#: Passes match on these, or the backend has kernels for them. Those of linear algebra raise for some values, as no parts of them do.
KEPT_WHOLE = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding matmul
    scaled_dot_product_attention layer_norm group_norm instance_norm rms_norm batch_norm softmax log_softmax
    silu hardswish hardsigmoid relu6 gelu elu selu celu mish leaky_relu softplus prelu threshold
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle
    linalg_cholesky linalg_inv linalg_solve linalg_lu_factor linalg_ldl_factor linalg_tensorinv""".split()
)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """Return ``exported`` in functional ATen operators, with those of KEPT_WHOLE as they are.

    Raises :class:`CaptureError` with torch's message where torch cannot decompose it.
    """
    exported = _without_aliases(exported)
    try:
        with fast_decompositions():
            table = decomposition_table()
            return exported if _is_decomposed(exported, table) else exported.run_decompositions(table)
    except Exception as error:
        if pair := _shared_memory(exported):
            raise CaptureError(
                f"the model writes, and its tensors {pair[0]!r} and {pair[1]!r} share memory; give one of them memory of its own (.clone())"
            ) from error
        raise CaptureError(f"torch cannot decompose the exported program: {str(error).strip()[:1500]}") from error


def _is_decomposed(exported: ExportedProgram, table: Mapping[Any, Any]) -> bool:
    """Return True only where decomposing would trace the same calls again: none is in the table, made of others, writes, or has effects."""
    specs = exported.graph_signature.output_specs
    calls = [n for n in exported.graph.nodes if n.op == "call_function"]
    return all(s.kind is OutputKind.USER_OUTPUT for s in specs) and all(_is_final(n, table) for n in calls)


def _is_final(call: fx.Node, table: Mapping[Any, Any]) -> bool:
    op = call.target
    if not isinstance(op, OpOverload) or op in table or op._schema.is_mutable or call.is_impure():
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return op in _kept_whole() or not composite


@cache
def _kept_whole() -> frozenset[OpOverload]:
    """Return the operators of KEPT_WHOLE that torch would decompose."""
    table = torch.export.default_decompositions()
    return frozenset(op for op in table if op._schema.name.removeprefix("aten::") in KEPT_WHOLE)


def decomposition_table() -> dict[OperatorBase, Callable[..., Any]]:
    """Return torch's table of decompositions without those of KEPT_WHOLE, and with that of products of groups of rows."""
    table = torch.export.default_decompositions()
    for operator in _kept_whole():
        table.pop(operator)
    table.update(grouped_products())
    table[aten.instance_norm.default] = _instance_norm
    table[aten.multilabel_margin_loss_forward.default] = _multilabel_margin_loss
    table[aten.as_strided.default] = _as_strided
    return table


def _as_strided(x: Tensor, size: list[int], stride: list[int], storage_offset: int | None = None) -> Any:
    """Read from the start of a contiguous tensor, so that the result depends neither on strides of ``x`` nor on where its memory begins.

    A permuted tensor is read in the order in which it lies in memory. One with gaps stays as it is.
    """
    start = 0 if storage_offset is None else storage_offset - x.storage_offset()
    order = sorted(range(x.dim()), key=lambda d: (x.shape[d] != 1, -x.stride(d)))
    memory = x.permute(order)
    if not memory.is_contiguous() or (x.is_contiguous() and start == (storage_offset or 0)):
        return NotImplemented
    if start < 0:
        raise ValueError("as_strided reads memory before the start of its argument")
    return torch.as_strided(memory.reshape(-1)[start:] if start else memory, size, stride)


def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int) -> Any:
    """Spell out the loss as torch does, but for a single sample that is not reduced: torch gives it another shape than eager."""
    if x.dim() < 2 and reduction == 0:
        return NotImplemented
    return torch._decomp.decomposition_table[aten.multilabel_margin_loss_forward.default](x, target, reduction)


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """Spell out the instance norm that writes running statistics: its schema says that it writes nothing. Any other stays whole."""
    if not use_input_stats or running_mean is None or running_var is None:
        return NotImplemented
    batch, channels, *image = x.shape
    mean, var = running_mean.repeat(batch), running_var.repeat(batch)
    scale, shift = (None if t is None else t.repeat(batch) for t in (weight, bias))
    flat = x.reshape(1, batch * channels, *image)
    result = torch.batch_norm(flat, scale, shift, mean, var, True, momentum, eps, cudnn_enabled)
    running_mean.copy_(mean.reshape(batch, channels).mean(0))
    running_var.copy_(var.reshape(batch, channels).mean(0))
    return result.reshape(x.shape)


def _without_aliases(exported: ExportedProgram) -> ExportedProgram:
    """Return ``exported`` without second names of a tensor that no call reads: torch does not decompose writes into what is there twice."""
    specs, nodes = (
        exported.graph_signature.input_specs,
        {n.name: n for n in exported.graph.nodes if n.op == "placeholder"},
    )
    read = {id(t) for s, t in _tensors(exported) if nodes[s.arg.name].users}
    unread = {s.arg.name for s, t in _tensors(exported) if not nodes[s.arg.name].users and id(t) in read}
    if not unread:
        return exported
    module = copy.deepcopy(exported.graph_module)
    for original, node in zip(exported.graph.nodes, module.graph.nodes):
        node.name = original.name  # a copy of ``input`` is called ``input_1``, and the signature would not know it
    for node in [n for n in module.graph.nodes if n.name in unread]:
        module.graph.erase_node(node)
    module.recompile()
    kept = [s for s in specs if s.arg.name not in unread]
    signature = dataclasses.replace(exported.graph_signature, input_specs=kept)
    return exported._update(module, signature)


def _tensors(exported: ExportedProgram) -> list[tuple[InputSpec, Tensor]]:
    """Return the parameters, buffers and constants of ``exported``, each with its specification."""
    values = {**exported.constants, **exported.state_dict}
    specs = exported.graph_signature.input_specs
    return [(s, values[s.target]) for s in specs if isinstance(values.get(s.target or ""), Tensor)]


def _shared_memory(exported: ExportedProgram) -> tuple[str, str] | None:
    """Return the names of two tensors of ``exported`` that have memory in common."""
    tensors = _tensors(exported)
    pair = shared_pair([t for _, t in tensors], range(len(tensors)))
    return None if pair is None else (str(tensors[pair[0]][0].target), str(tensors[pair[1]][0].target))
