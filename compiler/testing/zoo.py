"""Small models of every family, pruned, and what a pass does to each: did a change of a pass change what it does elsewhere?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from thresher import models
from thresher.analysis.cost.cost import count_flops
from thresher.frontend.capture import capture
from thresher.rewriting.contract import Pass
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare_programs, observe


def token_ids(batch: int, length: int) -> torch.Tensor:
    """Return the same random numbers from 0 to 99 each time, int64 [batch, length]."""
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(1))


ZOO: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "resnet18": lambda: (models.resnet18(classes=10, width=16), (torch.randn(2, 3, 64, 64),)),
    "resnet50": lambda: (models.resnet50(classes=10, width=16), (torch.randn(1, 3, 48, 48),)),
    "mobilenet": lambda: (
        models.MobileNetV2(10, [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 1)], 128),
        (torch.randn(2, 3, 32, 32),),
    ),
    "vit": lambda: (models.ViT(32, 8, 48, 3, 3, 4, 10), (torch.randn(2, 3, 32, 32),)),
    "bert": lambda: (models.BertEncoder(100, 48, 2, 4, 96, 32), (token_ids(2, 16),)),
    "bert_masked": lambda: (
        models.BertEncoder(100, 48, 2, 4, 96, 32),
        (token_ids(2, 16), torch.tensor([[1] * 16, [1] * 9 + [0] * 7])),
    ),
    "llama": lambda: (models.Llama(100, 64, 2, 8, 2, 96), (token_ids(2, 16),)),
    "unet": lambda: (models.UNet(8, 2), (torch.randn(2, 3, 32, 32),)),
    "lista": lambda: (models.LISTA(32, 64, 4, 0.01), (torch.randn(3, 32),)),
}


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and affine parameters, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                n = module.num_features
                module.running_mean.copy_(0.1 * torch.randn(n, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(n, generator=generator))
                if module.affine:
                    module.weight.copy_(0.5 + torch.rand(n, generator=generator))
                    module.bias.copy_(0.1 * torch.randn(n, generator=generator))
    return model.eval()


def mask_channels(
    model: nn.Module, amount: float, skip: tuple[str, ...] = ("fc", "head", "classifier", "pooler")
) -> nn.Module:
    """Mask random output channels of every convolution and linear layer with torch.nn.utils.prune."""
    torch.manual_seed(int(1000 * amount))
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) and not any(s in name for s in skip):
            prune.random_structured(module, "weight", amount, dim=1 if isinstance(module, nn.ConvTranspose2d) else 0)
    return model


WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def zero_channels(model: nn.Module, amount: float, seed: int = 0) -> nn.Module:
    """Set ``amount`` of the output channels of every convolution and linear layer to zero (weight and bias), but for the classifier."""
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in model.modules() if isinstance(m, WEIGHTED) or type(m).__name__ == "Conv1D"]
    with torch.no_grad():
        for module in layers[:-1]:
            transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or not isinstance(
                module, WEIGHTED
            )  # Conv1D: [in, out]
            count = module.weight.shape[1 if transposed else 0]
            dead = torch.randperm(count, generator=generator)[: int(amount * count)]
            module.weight.index_fill_(1 if transposed else 0, dead, 0)
            if module.bias is not None and module.bias.numel() == count:
                module.bias.index_fill_(0, dead, 0)
    return model


@dataclass(frozen=True)
class Replayed:
    """A model after passes: whether they changed it, what it costs now, and its error beside the original.

    ``digest`` is the rewritten graph without names: graphs are equal where their digests are.
    """

    changed: bool
    rewrites: int
    parameters: int
    flops: int
    error: float  # relative, float64
    digest: str


def replay(
    *passes: str | Pass, first: Sequence[str | Pass] = (), amount: float = 0.5, zoo: Mapping[str, Callable] = ZOO
) -> dict[str, Replayed]:
    """Run passes on every model of the zoo, a part of whose channels is masked.

    "Which models changed?" is ``{name for name in zoo if replay(new)[name] != replay(old)[name]}``.
    """

    replayed = {}
    for name, build in zoo.items():
        torch.manual_seed(0)
        model, args = build()
        program = capture(mask_channels(settle(model), amount), args)
        program = PassManager(first, "off").run(program) if first else program
        manager = PassManager(passes, "off")
        after = manager.run(program)
        rewrites = sum(len(r.rewrites) for r in manager.records)
        error = compare_programs(observe(program), after).relative
        replayed[name] = Replayed(
            after is not program,
            rewrites,
            after.parameter_count(),
            count_flops(after),
            error,
            after.text(canonical=True),
        )
    return replayed
