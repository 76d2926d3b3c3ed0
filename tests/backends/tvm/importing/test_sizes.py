"""Free sizes: plain ones, derived ones, arithmetic over them, and sizes that data decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.export import Dim

import thresher
from helpers.modules import Function

N = Dim("n", min=2)
FUNCTIONS: dict[str, Callable] = {
    "reshape": lambda x: x.reshape(x.shape[0] // 2, 2, 6) + 1,
    "a number of it": lambda x: x * x.shape[0] ** -0.5,
    "filled": lambda x: torch.cat([x, x.new_ones((x.shape[0] + 5) // 3, 6)]),
    "data decide": lambda x: x[x[:, 0] > 0] @ x.mT,
    "by torch": lambda x: torch.cummax(x.reshape(x.shape[0] // 2, 12), 0)[0],
}


EVEN = {"reshape", "by torch"}  # an odd size cannot be halved


@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in FUNCTIONS for dim in (N, 2 * N, 2 * N + 2) if dim is not N or name not in EVEN],
    ids=str,
)
def test_any_size(name: str, dim: Dim) -> None:
    function = FUNCTIONS[name]
    example = torch.randn(12, 6)
    compiled = thresher.compile(Function(function).eval(), (example,), target="cpu", dynamic_shapes=(({0: dim},),))
    for size in (6, 12, 26):
        x = torch.randn(size, 6)
        assert torch.allclose(compiled(x), function(x), atol=1e-4)
