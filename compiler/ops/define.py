"""One way to define an operator that stays whole in a captured graph; its gradients come from running the reference again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """``thresher::name``. ``reference`` computes it in plain torch on any device; ``fake`` gives empty tensors of the result's shapes."""
    full = f"thresher::{name}"
    torch.library.define(full, schema)
    torch.library.impl(full, "CompositeExplicitAutograd")(reference)
    torch.library.register_fake(full)(fake)

    def keep(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple:
        inputs, wanted = list(ctx.others), []
        for i, x in zip(ctx.places, ctx.saved_tensors):
            inputs[i] = x.detach().requires_grad_(ctx.needs_input_grad[i])
            wanted += [i] if ctx.needs_input_grad[i] else []
        with torch.enable_grad():
            result = reference(*inputs)
        grads: list[Any] = [None] * len(inputs)
        found = torch.autograd.grad(result, [inputs[i] for i in wanted], grad, allow_unused=True) if wanted else []
        for i, g in zip(wanted, found):
            grads[i] = g
        return tuple(grads)

    torch.library.register_autograd(full, backward, setup_context=keep)
