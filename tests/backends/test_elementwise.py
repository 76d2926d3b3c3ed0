"""The vectorised elementary functions over the whole range of float32, its ends included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thresher

ENDS = [
    0.0,
    -0.0,
    1.0,
    3e38,
    -3e38,
    float("inf"),
    -float("inf"),
    float("nan"),
    88.5,
    88.72,
    88.73,
    -87.4,
    -103.9,
    -104.1,
]


class Apply(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x) if self.name == "silu" else getattr(x, self.name)()


@pytest.mark.parametrize(
    ("name", "relative", "smallest"),
    [("exp", 2e-7, 1e-45), ("sigmoid", 4e-7, 1e-37), ("silu", 4e-7, 1e-35), ("erf", 1e-6, 1e-7), ("tanh", 1e-6, 1e-7)],
)
def test_range(name: str, relative: float, smallest: float) -> None:
    """``relative`` to the true value; results below ``smallest`` need not be told from 0."""
    x = torch.cat([torch.linspace(-110, 95, 100_003), torch.linspace(-1, 1, 1001), torch.tensor(ENDS)])
    got = thresher.compile(Apply(name), (x,), target="cpu", validate="off")(x).double()
    with torch.no_grad():
        want = Apply(name)(x.double())
    in_range = want.abs() < 3.4028235e38
    want = torch.where(in_range | want.isnan(), want, want.sign() * float("inf"))
    assert (got.isnan() == want.isnan()).all()
    assert (got.isinf() == want.isinf()).all()
    finite = want.isfinite()
    error = (got - want)[finite].abs() - relative * want[finite].abs()
    assert error.max() <= smallest
