"""Cases of the folding passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.cases.kinds import kinds
from helpers.folds import Net, kill
from helpers.planted import CONV_BN, MLP
from thresher.passes import pipelines
from thresher.testing import Case, Entry, settle


def forward_norm(n: int, c: int) -> tuple[nn.Module, tuple]:
    return settle(nn.Sequential(nn.BatchNorm1d(c), nn.Linear(c, 3))), (torch.randn(n, c),)


def scaled(n: int, c: int) -> tuple[nn.Module, tuple]:
    factors = torch.linspace(0.5, 2.0, c)
    return Net(lambda s, x: F.relu(s.a(x) * factors), a=nn.Linear(5, c)), (torch.randn(n, 5),)


def scaled_as(kind: str, n: int) -> tuple[nn.Module, tuple]:
    """A factor on either side, of an image, divided, after a threshold; and those that no weight can take."""
    c, image = 4, (torch.randn(n, 3, 5, 5),)
    factors = torch.linspace(0.5, 2.0, c)
    plane, rows = factors[:, None, None], torch.linspace(0.5, 2.0, n * c).reshape(n, c)
    linear, conv = nn.Linear(5, c), nn.Conv2d(3, c, 3, bias=False)
    forward, layer, args = {
        "left": (lambda s, x: F.relu(factors * s.a(x)), linear, (torch.randn(n, 5),)),
        "divided": (lambda s, x: F.relu(s.a(x) / plane), conv, image),
        "one number": (lambda s, x: F.relu(0.5 * s.a(x)), conv, image),
        "threshold": (lambda s, x: F.softshrink(s.a(x), 0.2) * plane, conv, image),
        "zeros": (lambda s, x: F.relu(s.a(x) * plane.round()), conv, image),
        "firm": (lambda s, x: torch.where(s.a(x).abs() > 0.2, s.a(x), 0.0) * 0.5, conv, image),
        "of any sign": (lambda s, x: F.softshrink(s.a(x), 0.2) * (plane - 1), conv, image),
        "each its own": (lambda s, x: F.relu(s.a(x) * rows), linear, (torch.randn(n, 5),)),
        "each sample": (lambda s, x: F.relu(s.a(x) * rows[:, :1]), linear, (torch.randn(n, 5),)),
        "by zero": (lambda s, x: F.relu(s.a(x) / plane.floor()), conv, image),
        "transposed": (lambda s, x: s.a(x) * plane, nn.ConvTranspose2d(3, c, 3), image),
    }[kind]
    return Net(forward, a=layer), args


SCALABLE = ("left", "divided", "one number", "threshold", "zeros")
LEFT = ("of any sign", "each its own", "each sample", "by zero", "transposed")


def copied(layer: nn.Module, *pairs: tuple[int, int]) -> nn.Module:
    """Make output channels copies of others."""
    with torch.no_grad():
        for target, source in pairs:
            layer.weight[target] = layer.weight[source]
            if layer.bias is not None:
                layer.bias[target] = layer.bias[source]
    return layer


def twins_in(kind: str, n: int) -> tuple[nn.Module, tuple]:
    """Copies of channels on the way through other operators, to two readers, and where they are none for the reader."""
    image, rows, c = (torch.randn(n, 3, 6, 6),), (torch.randn(n, 6),), 6
    conv, linear = copied(nn.Conv2d(3, c, 3, padding=1), (2, 0), (5, 1)), copied(nn.Linear(6, c, bias=False), (3, 0))
    scale = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0, 2.0])
    plane, one = torch.linspace(0.5, 2.0, 36).reshape(6, 6), torch.full((1, 1, 1), 0.5)
    forward, layers, args = {
        "image": (lambda s, x: s.b(F.max_pool2d(s.a(x).relu() * scale[:, None, None] * plane + one, 2)), [conv, nn.Conv2d(c, 4, 3)], image),
        "mean": (lambda s, x: s.b(s.a(x).relu().mean((2, 3))), [conv, nn.Linear(c, 4)], image),
        "two readers": (lambda s, x: s.b(s.a(x).relu()) + s.b(s.a(x).tanh()), [linear, nn.Linear(c, 4)], rows),
        "sum": (lambda s, x: s.b(s.a(x) + s.c(x)), [linear, nn.Linear(c, 4), copied(nn.Linear(6, c), (3, 0), (4, 1))], rows),
        "scaled apart": (lambda s, x: s.b(s.a(x) * torch.arange(6.0)), [linear, nn.Linear(c, 4)], rows),
        "groups": (lambda s, x: s.b(s.a(x).relu()), [conv, nn.Conv2d(c, 4, 3, groups=2)], image),
        "along another": (lambda s, x: s.b(s.a(x).relu()), [conv, nn.Linear(6, 4)], image),
        "transposed": (lambda s, x: s.b(s.a(x).relu()), [conv, nn.ConvTranspose2d(c, 4, 3)], image),
        "sum apart": (lambda s, x: s.b(s.a(x) + s.c(x)), [linear, nn.Linear(c, 4), nn.Linear(6, c)], rows),
        "own bias": (lambda s, x: s.b(s.a(x)), [nn.Linear(6, c), nn.Linear(c, 4)], rows),
    }[kind]  # fmt: skip
    if kind == "own bias":
        with torch.no_grad():
            layers[0].weight[2] = layers[0].weight[0]
    return Net(forward, **dict(zip("abc", layers))), args


MERGED = ("image", "mean", "two readers", "sum")
APART = ("scaled apart", "groups", "along another", "transposed", "sum apart", "own bias")


def norms(kind: str, n: int) -> tuple[nn.Module, tuple]:
    """Batch norms between layers of other kinds, without parameters of their own, and where no layer can take them."""
    image, volume = (torch.randn(n, 3, 6, 6),), (torch.randn(n, 3, 8),)
    modules, args = {
        "transposed": ([nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)], image),
        "transposed groups": ([nn.ConvTranspose2d(4, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4)], (torch.randn(n, 4, 5, 5),)),
        "plain": ([nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, affine=False)], volume),
        "into the next": ([nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False)], image),
        "padded": ([nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)], image),
        "grouped": ([nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, groups=3)], image),
        "rows": ([nn.Linear(8, 8), nn.BatchNorm1d(3), nn.Linear(8, 4)], volume),
    }[kind]  # fmt: skip
    return settle(nn.Sequential(*modules)), args


NORMS = ("transposed", "transposed groups", "plain", "into the next", "padded", "grouped", "rows")


def twins(n: int, c: int) -> tuple[nn.Module, tuple]:
    model = nn.Sequential(nn.Linear(6, c), nn.ReLU(), nn.Linear(c, 5))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = model[0].weight[0], model[0].bias[0]
    return model, (torch.randn(n, 6),)


def vocabulary(n: int, words: int) -> tuple[nn.Module, tuple]:
    model = nn.Sequential(nn.Embedding(words, 4), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[2:5] = model[0].weight[1].clone()
    return model, (torch.randint(0, words, (n, 5)),)


def one_sided(n: int, c: int) -> tuple[nn.Module, tuple]:
    """A residual branch that writes every other channel only."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.d(F.relu(y + s.c(F.relu(s.b(y)))))

    net = Net(forward, a=nn.Linear(5, c), b=nn.Linear(c, 6), c=nn.Linear(6, c), d=nn.Linear(c, 3))
    kill(net.c.weight, *range(0, c, 2))
    kill(net.c.bias, *range(0, c, 2))
    return net, (torch.randn(n, 5),)


READY = (*pipelines.canonicalize, "fold-batch-norm")

CASES = {
    "fold-batch-norm": [
        Entry(CONV_BN, first=("evaluate-constants",)),
        Entry(Case("batch norm, linear", forward_norm, n=(2, 3), c=(4, 5)), first=("evaluate-constants",)),
        *kinds("norm", norms, ("evaluate-constants",), NORMS, lost=("plain", "into the next")),
    ],
    "fold-scale": [
        Entry(Case("scaled layer", scaled, n=(2, 3), c=(4, 5)), first=("evaluate-constants", "simplify")),
        *kinds("scaled", scaled_as, pipelines.canonicalize, SCALABLE, LEFT),
    ],
    "merge-duplicates": [
        Entry(Case("twins", twins, n=(2, 3), c=(4, 6)), first=READY),
        *kinds("twins", twins_in, READY, MERGED, APART),
    ],
    "fold-vocabulary": [Entry(Case("equal rows", vocabulary, n=(2, 3), words=(7, 9)))],
    "permute-channels": [Entry(Case("one-sided", one_sided, n=(2, 3), c=(6, 7)), "{min_improvement=0}", READY)],
    "fold-channels": [
        Entry(MLP, "{min_improvement=0,round_to=1}", pipelines.canonicalize),
        Entry(Case("one-sided", one_sided, n=(2, 3), c=(6, 7)), "{min_improvement=0,round_to=1}", READY),
    ],
}
