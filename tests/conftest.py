"""Shared fixtures: small models of the zoo, with weights and statistics that make their outputs depend on their inputs."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from thresher import benchmark, driver, models
from thresher.analysis.cost import machine_of
from thresher.crossover import estimated

torch.set_num_threads(2)
hypothesis.settings.register_profile("untimed", deadline=None)  # no test judges a time
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """No test sees what tuning recorded on this machine, and none leaves records behind."""
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(benchmark, "PAUSE", 0.0)


@pytest.fixture(autouse=True)
def estimated_crossovers(monkeypatch) -> None:
    """Builds take what zeros save from the estimate: measuring it is tested where it is the subject (``crossover.measure``)."""
    monkeypatch.setattr(driver, "measure", lambda backend, target, layer: estimated(layer, machine_of(target)))


class Function(nn.Module):
    """A function, and the layers it is given, as a module."""

    def __init__(self, function: Callable, *layers: nn.Module):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.layers)


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


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(1))


ZOO: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "resnet18": lambda: (models.resnet18(classes=10, width=16), (torch.randn(2, 3, 64, 64),)),
    "resnet50": lambda: (models.resnet50(classes=10, width=16), (torch.randn(1, 3, 64, 64),)),
    "mobilenet": lambda: (
        models.MobileNetV2(10, [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 1)], 128),
        (torch.randn(2, 3, 64, 64),),
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


@pytest.fixture(params=sorted(ZOO))
def zoo_model(request: pytest.FixtureRequest) -> tuple[str, nn.Module, tuple]:
    """Each small model of the zoo in turn: its name, the module, its inputs."""
    torch.manual_seed(0)
    model, args = ZOO[request.param]()
    return request.param, settle(model), args
