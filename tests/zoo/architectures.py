"""The architectures of torchvision, timm and transformers that the fold is run on: random weights, no download.

An entry is a builder that returns ``(model, args)``; it imports its library when it is called. Vision models take the smallest input their
architecture takes, so that a float64 run is affordable; the widths are the published ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

Builder = Callable[[], tuple[nn.Module, tuple]]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_SHIM: list[torch.library.Library] = []


def _shim_torchvision() -> None:
    """PyPI's torchvision links CUDA: without it, importing needs the two operators that its Python code registers fakes for."""
    if not _SHIM:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SHIM.append(library)


# ---------------------------------------------------------------------- torchvision

FIXED = {
    "inception_v3": 299,
    "maxvit_t": 224,
    "vit_b_16": 224,
    "vit_b_32": 224,
    "vit_l_16": 224,
    "vit_l_32": 224,
    "vit_h_14": 224,
}


def torchvision_names() -> list[str]:
    """All 80 classification architectures."""
    _shim_torchvision()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def torchvision_model(name: str) -> tuple[nn.Module, tuple]:
    _shim_torchvision()
    import torchvision

    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    if name.startswith("vit_h"):
        extra["image_size"] = 224
    model = torchvision.models.get_model(name, weights=None, **extra)
    size = FIXED.get(name, 64)
    return model.eval(), (torch.randn(1, 3, size, size),)


# ---------------------------------------------------------------------- preparing


def settle(model: nn.Module, args: tuple = (), seed: int = 0) -> nn.Module:
    """Weights with which the output depends on the input and rounding does not grow: batch norms that normalise what they see (on a batch
    of random variants of ``args``), random affine parameters, layer scales that are not almost 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1, generator=generator)
        for module in norms:
            if module.affine:
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.1 * torch.randn(module.num_features, generator=generator))
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.fill_(0.5)
        if norms and args:
            model.eval()
            for module in norms:
                module.train()
                module.momentum = None  # the statistics of this one batch
                module.reset_running_stats()
            model(*(torch.randn(4, *a.shape[1:], generator=generator) if a.is_floating_point() else a for a in args))
    return model.eval()


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def zero_channels(model: nn.Module, amount: float, seed: int = 0) -> nn.Module:
    """Set ``amount`` of the output channels of every convolution and linear layer to zero (weight and bias), but for the classifier."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, WEIGHTED)]
    with torch.no_grad():
        for module in layers[:-1]:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
            count = module.weight.shape[1 if transposed else 0]
            dead = torch.randperm(count, generator=generator)[: int(amount * count)]
            module.weight.index_fill_(1 if transposed else 0, dead, 0)
            if module.bias is not None and module.bias.numel() == count:
                module.bias.index_fill_(0, dead, 0)
    return model
