"""Experts in fixed shapes: layers of transformers' models, and products of groups of rows, as calls of ``thresher::expert_linear``.

From version 5 on, transformers computes the experts of a layer by a function that its configuration names. "eager" loops over the experts
that some token chose, which no export can; "batched_mm" gathers a weight for every token; "grouped_mm" sorts the tokens. They are the same
function of (hidden states [T, H], chosen experts [T, k], their shares [T, k]) -> [T, H], and so is the one here.

Where a graph has been traced already, it has the products of "grouped_mm": rows [S, K] sorted by group, weights [G, K, N] and the ends
of the groups [G]. The group of row i is the number of ends that are not above i.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.errors import CaptureError

TABLE = "transformers.integrations.moe"  # the module with the functions by name; not there before version 5
ALIKE = (None, "eager", "batched_mm", "grouped_mm")  # the functions of transformers that compute the same


@contextlib.contextmanager
def static_experts() -> Iterator[None]:
    """Let experts be computed in fixed shapes for the time of the block.

    The experts layers of transformers go through :func:`routed_experts`, but those whose configuration names a function of the user's or a
    quantised one; and ``torch._grouped_mm`` through :func:`grouped_product`, because torch knows its shapes for bfloat16 only.
    """
    table = getattr(sys.modules.get(TABLE), "ALL_EXPERTS_FUNCTIONS", None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(torch, "_grouped_mm", grouped_product))
        if table is not None:
            original = table.get_interface

            def get_interface(name: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
                return routed_experts if name in ALIKE else original(name, default)

            stack.enter_context(_replaced(table, "get_interface", get_interface))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for the time of the block; one of the owner's class is uncovered again after it."""
    inherited = name not in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def routed_experts(layer: Any, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """Return the sum of what the chosen experts of each token compute, weighted by their shares.

    Args:
        layer: a module whose class transformers decorated with ``use_experts_implementation``.
        hidden: [T, H].
        experts: [T, k]; a number that is no expert's counts nothing.
        shares: [T, k].
    """
    tokens, count = experts.shape
    inner = _project(layer, "gate_up_proj" if layer.has_gate else "up_proj", hidden[:, None], experts).flatten(0, 1)
    inner = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
    value = _project(layer, "down_proj", inner, experts.flatten())
    if layer.has_post_expert_norm:
        value = layer.post_expert_norm(value)
    value = value * shares.reshape(-1, 1)
    return value.unflatten(0, (tokens, count)).sum(1).to(hidden.dtype)


def _project(layer: Any, name: str, x: Tensor, experts: Tensor) -> Tensor:
    weight = getattr(layer, name)
    bias = getattr(layer, f"{name}_bias") if layer.has_bias else None
    weight = weight.transpose(1, 2) if layer.is_transposed else weight
    return torch.ops.thresher.expert_linear(x, experts, weight, bias)


def grouped_products() -> dict[Any, Callable[..., Tensor]]:
    """Return the decompositions of products of groups of rows, by operator: torch's, and transformers' where it is imported."""
    table: dict[Any, Callable[..., Tensor]] = {torch.ops.aten._grouped_mm.default: grouped_product}
    if TABLE in sys.modules and hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        table[torch.ops.transformers.grouped_mm_fallback.default] = grouped_product
    return table


def grouped_product(
    rows: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """Return rows [S, K] times weight [G, K, N], each row times its group's; a row after the last group is 0.

    Raises :class:`CaptureError` for the groups of other arguments, of which gradients are made.
    """
    if rows.dim() != 2 or weight.dim() != 3 or offs is None or bias is not None:
        raise CaptureError(
            f"torch._grouped_mm of shapes {tuple(rows.shape)} and {tuple(weight.shape)} is not supported, only that of rows [S, K] and "
            "weights [G, K, N] with offs; use torch.bmm where all groups are equal"
        )
    number = torch.arange(rows.shape[0], device=rows.device, dtype=offs.dtype)
    group = (offs[None] <= number[:, None]).sum(1)
    value = torch.ops.thresher.expert_linear(rows, group, weight.transpose(1, 2), None)
    return value if out_dtype is None else value.to(out_dtype)
