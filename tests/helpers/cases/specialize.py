"""Cases of the passes that give the form that a backend's kernels run best."""

from __future__ import annotations

import torch
from torch import nn

from thresher.testing import Case, Entry


def image(n: int, c: int) -> tuple[nn.Module, tuple]:
    layers = nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, 4, 1)
    return nn.Sequential(*layers), (torch.randn(n, 3, 6, 7),)


def sequence(n: int, c: int) -> tuple[nn.Module, tuple]:
    layers = nn.Conv1d(3, c, 3, stride=2), nn.GELU(), nn.ConvTranspose1d(c, 4, 2, stride=2), nn.AdaptiveAvgPool1d(1)
    return nn.Sequential(*layers), (torch.randn(n, 3, 9),)


CASES = {
    "channels-last": [
        Entry(Case("image", image, n=(2, 3), c=(4, 5)), first=("simplify",)),
        Entry(Case("sequence", sequence, n=(2, 3), c=(4, 5)), first=("simplify",)),
    ],
}
