"""U-Net (Ronneberger et al., 2015) with padded convolutions, batch norm and transposed convolutions on the way up."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images [N, 3, H, W] -> maps [N, classes, H, W]; H and W divisible by 2**depth."""

    def __init__(self, width: int = 32, depth: int = 3, classes: int = 2):
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.stem, self.pool = _double(3, width), nn.MaxPool2d(2)
        self.down = nn.ModuleList(_double(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.merge = nn.ModuleList(_double(2 * a, a) for a in widths[-2::-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        for block in self.down:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)
