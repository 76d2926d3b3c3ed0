"""Models for simplification: each spells something in another way than the passes after it expect."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.cases.kinds import kinds
from helpers.modules import Function


def nothing(x: Tensor) -> Tensor:
    """Return the relu of x, after calls that do nothing."""
    y = F.dropout(x.clone().detach(), 0.5, False) * 1 + 0
    y = torch.cat([F.pad(y, (0, 0))[:, :] - 0]) / 1
    return y.view(y.shape).permute(0, 1).expand(y.shape).to(torch.float32).contiguous().relu()


def something(x: Tensor) -> Tensor:
    """Return what calls make that look like those of :func:`nothing`."""
    y = (x * 2 + 1).permute(1, 0)[:, ::2].sub(1, alpha=2) / 2
    return torch.cat([F.pad(y, (0, 1)), F.pad(y, (1, 0))]).clone().relu()


def parts(x: Tensor) -> Tensor:
    a, b, c, d = x.unbind(1)
    e, f = x.split([1, 3], 1)
    g, h = x.split(3, dim=1)
    i, j = x.chunk(2, -1)
    return a - b * c / (d.abs() + 1) + (e - f).sum(1) + (g * h).sum(1) + (i - 2 * j).sum((1, 2))[:, None]


def positive(x: Tensor) -> Tensor:
    zero = torch.zeros(())
    return (
        x.clamp(min=0)
        - 2 * (x - 1).clamp_min(0)
        + torch.maximum(x + 1, zero) * torch.maximum(zero, x - 2)
        - F.threshold(-x, 0, 0)
    )


def not_quite_positive(x: Tensor) -> Tensor:
    return (
        x.clamp(min=0, max=6)
        + x.clamp(min=1)
        - torch.maximum(x, -x)
        + F.threshold(x, 0.5, 0.0)
        + F.threshold(x, 0.0, 1.0)
    )


def largest(x: Tensor) -> Tensor:
    return x - torch.topk(x, 3).values[..., -1:] - torch.topk(x, 2, -1).values[..., 1:]


def other_largest(x: Tensor) -> Tensor:
    first, smallest = torch.topk(x, 3).values[..., :1], torch.topk(x, 3, largest=False).values[..., -1:]
    rows = torch.topk(x, 2, 0).values[-1:] - torch.topk(x[:, :1], 2, 0).values[1:]
    several, none = torch.topk(x, 5).values[..., 1:].sum(-1, True), torch.topk(x, 4).values[..., 3:-1].sum()
    return x - first - smallest - rows - several - none


MATRIX = torch.linspace(-1.0, 1.0, 24).reshape(6, 4)


def products(x: Tensor) -> Tensor:
    return (
        x @ MATRIX + torch.mm(x, MATRIX) * 2 - torch.addmm(MATRIX[0], x, MATRIX) + torch.einsum("ab,bc->ac", x, MATRIX)
    )


def other_products(x: Tensor) -> Tensor:
    a = MATRIX.t() @ x.t() @ MATRIX.t()[:2].new_ones(x.shape[0], 3)
    rows = torch.linspace(-1.0, 1.0, 4 * x.shape[0]).reshape(x.shape[0], 4)
    return a.sum() + torch.addmm(rows, x, MATRIX) + torch.addmm(MATRIX[0], x, MATRIX, beta=2) + (x[0] @ MATRIX)


def twice(x: Tensor) -> Tensor:
    return (
        x.relu() * 2
        + x.relu() * 2.0
        - x.sum(1, True) * x.sum(1, keepdim=False)[:, None]
        + (x + 0.0).exp()
        - (x + 0.0).exp() / 3
    )


def expanded(x: Tensor) -> Tensor:
    wide, column = x[:1].expand(x.shape), x[:, :1].expand(x.shape)
    return (
        wide.exp() * 2
        + (column - column.relu()) * x
        + torch.add(column, column.tanh(), alpha=3)
        - wide.sub(wide.sin(), alpha=2)
    )


def beside(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) * x - x[:, :1].expand(x.shape).cumsum(1)


def attention(mask: Tensor) -> nn.Module:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, mask)

    return Function(attend)


def wide_mask(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, mask.expand(len(q), 2, 3, 3))


def spelled(kind: str, n: int) -> tuple[nn.Module, tuple]:
    rows, image, tokens = (
        (torch.randn(n, 6),),
        (torch.randn(n, 4, 5, 5),),
        (torch.randn(n, 2, 3, 4), torch.randn(n, 2, 3, 4)),
    )
    below = torch.ones(3, 3, dtype=torch.bool).tril()
    functions = {
        "nothing": nothing, "something": something, "positive": positive, "not quite positive": not_quite_positive, "largest": largest,
        "other largest": other_largest, "products": products, "other products": other_products, "twice": twice, "expanded": expanded,
        "beside": beside,
    }  # fmt: skip
    models = {
        "parts": lambda: (Function(parts), (torch.randn(n, 4, 6),)),
        "slopes": lambda: (nn.PReLU(4), image),
        "slope": lambda: (nn.PReLU(), rows),
        "instance": lambda: (nn.InstanceNorm2d(4, affine=True, eps=0.1), image),
        "shuffle": lambda: (nn.ChannelShuffle(2), image),
        "empty mask": lambda: (attention(torch.ones(3, 3, dtype=torch.bool)), tokens),
        "zero mask": lambda: (attention(torch.zeros(3, 3)), tokens),
        "wide mask": lambda: (Function(wide_mask), (*tokens, torch.randn(1, 1, 3, 3))),
        "mask": lambda: (attention(below), tokens),
        "statistics": lambda: (nn.InstanceNorm2d(4, track_running_stats=True), image),
    }
    return models[kind]() if kind in models else (Function(functions[kind]), rows)


SPELLED = (
    "nothing", "positive", "largest", "products", "twice", "expanded", "parts", "slopes", "slope", "instance", "shuffle", "empty mask",
    "zero mask", "wide mask",
)  # fmt: skip
PLAIN = ("beside", "not quite positive", "other largest", "other products", "mask", "statistics")
ENTRIES = kinds("spelled", spelled, (), SPELLED, PLAIN) + kinds("mixed", spelled, (), ("something",))
