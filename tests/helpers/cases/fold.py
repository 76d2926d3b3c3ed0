"""Cases of the folding passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.folds import Net, kill
from helpers.planted import CONV_BN, MLP
from thresher.passes import pipelines
from thresher.testing import Case, Entry, settle


def forward_norm(n: int, c: int) -> tuple[nn.Module, tuple]:
    return settle(nn.Sequential(nn.BatchNorm1d(c), nn.Linear(c, 3))), (torch.randn(n, c),)


def scaled(n: int, c: int) -> tuple[nn.Module, tuple]:
    factors = torch.linspace(0.5, 2.0, c)
    return Net(lambda s, x: F.relu(s.a(x) * factors), a=nn.Linear(5, c)), (torch.randn(n, 5),)


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
    ],
    "fold-scale": [Entry(Case("scaled layer", scaled, n=(2, 3), c=(4, 5)), first=("evaluate-constants", "simplify"))],
    "merge-duplicates": [Entry(Case("twins", twins, n=(2, 3), c=(4, 6)), first=READY)],
    "fold-vocabulary": [Entry(Case("equal rows", vocabulary, n=(2, 3), words=(7, 9)))],
    "permute-channels": [Entry(Case("one-sided", one_sided, n=(2, 3), c=(6, 7)), "{min_improvement=0}", READY)],
    "fold-channels": [
        Entry(MLP, "{min_improvement=0,round_to=1}", pipelines.canonicalize),
        Entry(Case("one-sided", one_sided, n=(2, 3), c=(6, 7)), "{min_improvement=0,round_to=1}", READY),
    ],
}
