"""Cases of the passes that remove whole layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.cases.contexts import calibrated
from helpers.folds import Net
from thresher.testing import Case, Entry


def residual(n: int, c: int) -> tuple[nn.Module, tuple]:
    """Two branches, the second of which does little."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = x + s.a(F.relu(x))
        return x + s.b(F.relu(x))

    net = Net(forward, a=nn.Linear(c, c), b=nn.Linear(c, c))
    with torch.no_grad():
        for parameter in net.b.parameters():
            parameter *= 0.01
    return net, (torch.randn(n, 3, c),)


CASES = {
    "drop-sublayers": [Entry(Case("two branches", residual, n=(1, 2), c=(6, 8)), context=calibrated(0.05))],
}
