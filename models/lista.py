"""LISTA (Gregor & LeCun, 2010): sparse coding as an unfolded network, z <- soft(W x + S z, theta)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LISTA(nn.Module):
    """Signals [N, signal] -> codes [N, code], with one threshold per code and layer."""

    def __init__(self, signal: int = 256, code: int = 1024, layers: int = 16, threshold: float = 0.1):
        super().__init__()
        dictionary = nn.functional.normalize(torch.randn(signal, code), dim=0)
        step = 1.0 / torch.linalg.matrix_norm(dictionary, 2).item() ** 2
        self.w = nn.Linear(signal, code, bias=False)
        self.s = nn.Linear(code, code, bias=False)
        self.theta = nn.Parameter(torch.full((layers, code), threshold * step))
        with torch.no_grad():
            self.w.weight.copy_(step * dictionary.T)
            self.s.weight.copy_(torch.eye(code) - step * dictionary.T @ dictionary)

    def forward(self, x: Tensor) -> Tensor:
        drive = self.w(x)
        z = torch.zeros_like(drive)
        for theta in self.theta:
            z = drive + self.s(z)
            z = torch.relu(z - theta) - torch.relu(-z - theta)
        return z
