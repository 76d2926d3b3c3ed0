"""Cases of the passes that skip zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from helpers.cases.contexts import calibrated, skipping
from helpers.folds import Net
from thresher.testing import Case, Entry


def pruned(n: int, c: int) -> tuple[nn.Module, tuple]:
    layer = nn.Linear(c, 32)
    with torch.no_grad():
        layer.weight *= torch.rand(layer.weight.shape) < 0.1
    return nn.Sequential(layer, nn.ReLU()), (torch.randn(n, c),)


def closed(n: int, c: int) -> tuple[nn.Module, tuple]:
    model = nn.Sequential(nn.Linear(6, c), nn.ReLU(), nn.Linear(c, 4))
    with torch.no_grad():
        model[0].bias -= 0.5
    return model, (torch.randn(n, 6),)


def gated(n: int, c: int) -> tuple[nn.Module, tuple]:
    net = Net(
        lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)),
        gate=nn.Linear(8, c), up=nn.Linear(8, c), down=nn.Linear(c, 8),
    )  # fmt: skip
    with torch.no_grad():
        net.gate.weight *= 6
    return net, (torch.randn(n, 8),)


CASES = {
    "skip-pruned-weights": [Entry(Case("pruned", pruned, n=(1, 3), c=(32, 48)), context=skipping)],
    "skip-zeros": [Entry(Case("relu", closed, n=(1, 3), c=(16, 32)), context=skipping)],
    "select-neurons": [
        Entry(Case("gated", gated, n=(8,), c=(16, 32)), "{block=4}", context=calibrated(0.9)),
    ],
    "threshold-activations": [Entry(Case("gated", gated, n=(1,), c=(16, 32)), context=calibrated(0.5))],
}
