"""Unfolded iterations and wavelet shrinkage: what does not change is computed once, an iteration is as few kernels as it can be."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
import thresher.ops
from thresher.verification.compare import compare

SIGNAL, CODE, LAYERS = 24, 64, 6
shrink = torch.ops.thresher.shrink.default


def kernels(compiled: thresher.Compiled) -> list[str]:
    text = compiled.executable.code.as_text()
    return [name for name in re.findall(r"call\s+(\w+)", text) if not name.startswith("vm")]


class Unfolded(nn.Module):
    """LAYERS iterations of ``step(z, x, self)``, with the matrices that they need."""

    def __init__(self, step: Callable):
        super().__init__()
        torch.manual_seed(0)
        dictionary = F.normalize(torch.randn(SIGNAL, CODE), dim=0)
        length = 1 / torch.linalg.matrix_norm(dictionary, 2) ** 2
        self.register_buffer("w", length * dictionary.T)
        self.register_buffer("s", torch.eye(CODE) - length * dictionary.T @ dictionary)
        self.theta, self.step = 0.1 * float(length), step

    def forward(self, x: Tensor) -> Tensor:
        z = before = torch.zeros(len(x), CODE)
        for layer in range(LAYERS):
            z, before = self.step(self, z, before, x, layer), z
        return z


def ista(self, z, before, x, layer):
    u = x @ self.w.T + z @ self.s.T  # the first product again and again
    return torch.sign(u) * F.relu(u.abs() - self.theta)


def fista(self, z, before, x, layer):
    y = z + layer / (layer + 3) * (z - before)
    return F.softshrink(x @ self.w.T + y @ self.s.T, self.theta)


def iht(self, z, before, x, layer):
    u = x @ self.w.T + z @ self.s.T
    return u * (u.abs() >= u.abs().topk(5, -1).values[..., -1:])


@pytest.mark.parametrize(("step", "most"), [(ista, 1), (fista, 2), (iht, 4)])
def test_iterations(step: Callable, most: int) -> None:
    """One product more than there are iterations (the first is of zeros), and ``most`` kernels for each."""
    model, x = Unfolded(step).eval(), torch.randn(3, SIGNAL, generator=torch.Generator().manual_seed(1))
    compiled = thresher.compile(model, (x,))
    assert not compare([model(x)], [compiled(x)]).exceeds(1e-5)
    found = kernels(compiled)
    products = [n for n in found if "linear" in n or "matmul" in n]
    assert len(products) == LAYERS, found
    assert len(found) <= 1 + most * LAYERS + 1, found


class Denoise(nn.Module):
    """Wavelet shrinkage (Donoho & Johnstone, 1994) of periodic signals [N, 1, L]: PyWavelets' filters as convolutions, each level's
    details thresholded at sigma sqrt(2 log L)."""

    def __init__(self, wavelet: str, levels: int, mode: str, sigma: float, length: int):
        super().__init__()
        bank = pywt.Wavelet(wavelet)
        self.taps = bank.dec_len
        self.register_buffer("down", torch.tensor([bank.dec_lo[::-1], bank.dec_hi[::-1]])[:, None])
        self.register_buffer("up", torch.tensor([bank.rec_lo, bank.rec_hi])[:, None])
        self.levels, self.mode, self.limit = levels, mode, sigma * float(np.sqrt(2 * np.log(length)))

    def threshold(self, d: Tensor) -> Tensor:
        t = self.limit
        if self.mode == "soft":
            return torch.sign(d) * torch.clamp(d.abs() - t, min=0)
        if self.mode == "hard":
            return torch.where(d.abs() < t, 0.0, d)  # as pywt has it
        return d * F.relu(1 - t**2 / d**2)

    def forward(self, x: Tensor) -> Tensor:
        details = []
        for _ in range(self.levels):
            half = self.taps // 2
            around = torch.cat([x[..., -half + 1 :] if half > 1 else x[..., :0], x, x[..., :half]], -1)[
                ..., : x.shape[-1] + self.taps - 2
            ]
            both = F.conv1d(around, self.down, stride=2)
            x, detail = both[:, :1], both[:, 1:]
            details.append(self.threshold(detail))
        for detail in reversed(details):
            length = 2 * x.shape[-1]
            wide = F.conv_transpose1d(torch.cat([x, detail], 1), self.up, stride=2)
            rest = wide.shape[-1] - length
            wrapped = wide[..., :length] + F.pad(wide[..., length:], (0, length - rest))
            shift = self.taps // 2 - 1
            x = torch.cat([wrapped[..., shift:], wrapped[..., :shift]], -1)
        return x


@pytest.mark.parametrize("mode", ["soft", "hard", "garrote"])
@pytest.mark.parametrize("wavelet", ["haar", "db4"])
def test_wavelet_shrinkage(wavelet: str, mode: str) -> None:
    """PyWavelets does the same to the same signal; every threshold is one operator."""
    length, levels = 64, 2
    x = torch.randn(2, 1, length, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 4
    model = Denoise(wavelet, levels, mode, 0.1, length).eval().float()
    wanted = []
    for row in x[:, 0].double().numpy():
        approximation, *details = pywt.wavedec(row, wavelet, mode="periodization", level=levels)
        details = [pywt.threshold(d, model.limit, mode) for d in details]
        wanted.append(pywt.waverec([approximation, *details], wavelet, mode="periodization"))
    assert not compare([torch.tensor(np.stack(wanted))[:, None]], [model(x)]).exceeds(1e-5)
    compiled = thresher.compile(model, (x,))
    assert not compare([model(x)], [compiled(x)]).exceeds(1e-5)
    program = thresher.rewrite(model, (x,)).program
    assert len(list(program.calls(shrink))) == levels
