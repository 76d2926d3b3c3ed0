"""Weights for models that come without: the output depends on every input, and stays in the range of float32."""

from __future__ import annotations

import math

import torch
from torch import nn

from thresher.models.families.sample import Inputs


def randomize(model: nn.Module, inputs: Inputs, seed: int = 0) -> nn.Module:
    """Give ``model`` random weights, and batch norms the statistics of what they see on ``inputs``; return it in evaluation mode.

    Tensors of two or more dimensions have entries of variance one over the fan-in. Constant vectors (the scales and biases of norms, layer
    scales) get noise; small scales become 0.5, else a layer would be invisible behind its residual sum. Codebooks, which are buffers, get
    random vectors: with those of zeros that they begin with, every input would have the same code.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                _fill(parameter, generator)
        _fill_codebooks(model, generator)
        _settle_batch_norms(model, inputs, generator)
    return model.eval()


def _fill(parameter: nn.Parameter, generator: torch.Generator) -> None:
    if parameter.dim() > 1:
        parameter.normal_(0, 1 / math.sqrt(max(parameter[0].numel(), 1)), generator=generator)
    elif bool((parameter == parameter[0]).all()):
        if 0 < abs(float(parameter[0])) < 0.1:
            parameter.fill_(0.5)
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)


def _fill_codebooks(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if "Codebook" in type(module).__name__:
            for buffer in module.buffers(recurse=False):
                if buffer.is_floating_point() and buffer.dim() > 1:
                    buffer.normal_(generator=generator)


def _settle_batch_norms(model: nn.Module, inputs: Inputs, generator: torch.Generator) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # the statistics of this one call
        norm.reset_running_stats()
    if norms:
        try:
            model(*inputs.args, **inputs.kwargs)
        except ValueError:  # one value a channel has no variance
            for norm in norms:
                norm.reset_running_stats()
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var.clamp_(min=1e-3)
