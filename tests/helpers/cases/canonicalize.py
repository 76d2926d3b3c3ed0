"""Cases of the canonicalising passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers.cases import spellings
from helpers.cases.kinds import kinds
from helpers.modules import Function
from thresher.testing import Case, Entry


def masked(n: int, c: int) -> tuple[nn.Module, tuple]:
    layer = nn.Linear(5, c)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.ReLU()), (torch.randn(n, 5),)


def spectrum(n: int, c: int) -> tuple[nn.Module, tuple]:
    return Function(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 0.5, n=x.shape[-1])), (torch.randn(n, c),)


class Parts(nn.Module):
    """Two halves, one of them through a product with a constant matrix and a dropout."""

    def __init__(self, c: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c, c))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return F.dropout(a @ self.weight, 0.5, self.training) * 1 + F.prelu(b, torch.full((1,), 0.2))


def parts(n: int, c: int) -> tuple[nn.Module, tuple]:
    return Parts(c), (torch.randn(n, 2 * c),)


def heads(n: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(n, 2, tokens, 4) for _ in range(3))
    return q, k, v


def spelled_out(n: int, tokens: int) -> tuple[nn.Module, tuple]:
    below = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    attend = lambda q, k, v: (q @ k.mT / 2).masked_fill(~below, -1e9).softmax(-1) @ v  # noqa: E731
    return Function(attend), heads(n, tokens)


def grouped(n: int, tokens: int) -> tuple[nn.Module, tuple]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(n, 2, 3, tokens, 4).reshape(n, 6, tokens, 4) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    _, k, v = heads(n, tokens)
    return Function(attend), (torch.randn(n, 6, tokens, 4), k, v)


def shared(kind: str, n: int) -> tuple[nn.Module, tuple]:
    """Keys and values that are repeated by a reshape, of one of them only, or in another order than heads are shared."""
    t, groups, times = 3, 3 if kind == "tiled" else 2, 3
    shape = (n, groups * times, t, 4)

    def repeated(x: Tensor) -> Tensor:
        if kind == "tiled":
            return x[:, None].expand(n, times, groups, t, 4).reshape(shape)
        if kind == "joined":
            return torch.cat([x[:, :, None]] * times, 2).reshape(shape)
        if kind == "along the features":
            return x.reshape(n, 2, t, 4)[..., :1].expand(n, 2, t, 12).reshape(shape)
        wide = x.reshape(n, groups, 1, t, 4) if kind == "reshaped" else x[:, :, None]
        return wide.expand(n, groups, times, t, 4).reshape(shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        values = v.repeat(1, times, 1, 1) if kind == "keys only" else repeated(v)
        return F.scaled_dot_product_attention(q, repeated(k), values)

    _, k, v = (torch.randn(n, groups, t, 4) for _ in range(3))
    return Function(attend), (torch.randn(shape), k, v)


class Weight(nn.Module):
    """A square weight, a mask and a row, and the function that uses them."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.weight, self.row = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1, 4))
        self.register_buffer("mask", torch.eye(4) + 0.5)
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


COMPUTED: dict[str, Callable] = {
    "filled": lambda s, x: x + torch.zeros_like(x).cos() - torch.full_like(x, 3.0) * torch.ones_like(x),
    "moved": lambda s, x: F.linear(x, s.weight.t()[1:, :].clone()),
    "parts": lambda s, x: F.linear(x, s.weight.split(2)[1]) * F.linear(x, s.weight.chunk(2)[0]),
    "scaled": lambda s, x: F.linear(x, s.weight * 2.0 * s.mask),
    "twice": lambda s, x: F.linear(x, s.weight * s.mask) + F.linear(x.relu(), s.weight * s.mask),
    "buffer": lambda s, x: x * s.mask.exp().sum(0) + (s.mask[0] > 1),
    "squared": lambda s, x: F.linear(x, s.weight * s.weight),
    "expanded": lambda s, x: x * (s.row * 2).expand(3, 4)[0],
    "expanded buffer": lambda s, x: x * s.mask[:1].expand(3, 4)[0],
    "expanded signs": lambda s, x: x * (s.row > 0).expand(3, 4)[0],
    "not copied": lambda s, x: x * s.row.expand(1, 1, 4)[0],
    "indexed": lambda s, x: F.linear(x, s.weight.index_select(0, s.order)) * F.embedding(s.order, s.weight)[0],
    "bits": lambda s, x: x * ((s.order >> 1) & 1),
    "scaled, then moved": lambda s, x: F.linear(x, (s.weight * s.mask)[1:]),
}


def computed(kind: str, n: int) -> tuple[nn.Module, tuple]:
    return Weight(COMPUTED.get(kind, lambda s, x: x * s.row.expand(x.shape[0], 4))), (torch.randn(n, 4),)


def softshrink(n: int) -> tuple[nn.Module, tuple]:
    return nn.Softshrink(0.3), (torch.randn(n, 5),)


def dividing(kind: str, n: int) -> tuple[nn.Module, tuple]:
    function = {
        "modulus": lambda x: x * F.relu(1 - 0.3 / x.abs()),
        "garrote": lambda x: x * F.relu(1 - 0.09 / x**2),
        "groups": lambda x: x * F.relu(1 - 0.3 / torch.linalg.vector_norm(x, dim=-1, keepdim=True)),
    }[kind]
    return Function(function), (torch.randn(n, 5),)


def soft(n: int, c: int) -> tuple[nn.Module, tuple]:
    return Function(lambda x: F.relu(x - 0.3) - F.relu(-x - 0.3)), (torch.randn(n, c),)


CASES = {
    "evaluate-constants": [
        Entry(Case("masked layer", masked, n=(1, 3), c=(4, 6))),
        *kinds(
            "computed", computed, (), tuple(COMPUTED), ("torn",), lost=("squared", "scaled, then moved", "not copied")
        ),
    ],
    "complex-numbers": [Entry(Case("spectrum", spectrum, n=(2, 3), c=(6, 7)))],
    "simplify": [Entry(Case("parts of a value", parts, n=(2, 3), c=(2, 3))), *spellings.ENTRIES],
    "canonicalize-attention": [
        Entry(Case("spelled out", spelled_out, n=(2, 3), tokens=(3, 5)), first=("evaluate-constants", "simplify"))
    ],
    "share-key-heads": [
        Entry(Case("grouped", grouped, n=(2, 3), tokens=(3, 5)), first=("simplify",)),
        *kinds("shared", shared, ("simplify",), ("reshaped",), ("tiled", "joined", "along the features", "keys only")),
    ],
    "canonicalize-threshold": [
        Entry(Case("soft", soft, n=(2, 3), c=(4, 5)), first=("simplify",)),
        Entry(Case("shrink", softshrink, n=(2, 3))),
        Entry(
            Case("dividing", dividing, kind=("modulus", "garrote", "groups"), n=(2,)), first=("simplify",), misses=10
        ),
    ],
}
