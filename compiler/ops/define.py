"""Define operators that stay whole in a captured graph; their gradients come from running the reference again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What each operator computes, in plain torch, by its full name.
REFERENCES: dict[str, Callable[..., Any]] = {}


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define the operator ``thresher::name``, or ``name`` where it has a namespace.

    Args:
        name: of the operator.
        schema: its arguments and results in torch's notation.
        reference: computes it in plain torch on any device, differentiably.
        fake: returns empty tensors of the results' shapes and dtypes.
    """
    full = name if "::" in name else f"thresher::{name}"
    REFERENCES[full] = reference
    torch.library.define(full, schema)
    torch.library.impl(full, "CompositeExplicitAutograd")(reference)
    torch.library.register_fake(full)(fake)

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.positions = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.positions))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        inputs, wanted = list(ctx.others), [i for i in ctx.positions if ctx.needs_input_grad[i]]
        for i, x in zip(ctx.positions, ctx.saved_tensors):
            inputs[i] = x.detach().requires_grad_(ctx.needs_input_grad[i])
        with torch.enable_grad():
            result = reference(*inputs)
        results = result if isinstance(result, tuple) else (result,)
        pairs = [(r, g) for r, g in zip(results, grads) if r.requires_grad and g is not None]
        gradients: list[Any] = [None] * len(inputs)
        if wanted and pairs:
            outputs, output_gradients = zip(*pairs)
            sources = [inputs[i] for i in wanted]
            for i, g in zip(wanted, torch.autograd.grad(outputs, sources, output_gradients, allow_unused=True)):
                gradients[i] = g
        return tuple(gradients)

    torch.library.register_autograd(full, backward, setup_context=keep)
