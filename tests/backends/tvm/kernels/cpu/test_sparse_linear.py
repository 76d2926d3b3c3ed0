"""Linear layers that skip zeros: the kernels against the dense layer, what follows them, and that what is skipped is not read."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.verification.compare import compare

ops = torch.ops.thresher


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Sparse(nn.Module):
    def __init__(self, n: int, k: int, bias: bool, then: str = "", seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(rand(n, k, seed=seed))
        self.bias = nn.Parameter(rand(n, seed=seed + 1)) if bias else None
        self.register_buffer("theta", rand(n, seed=seed + 2).abs())
        self.then = then

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = ops.sparse_linear(x, self.weight, self.bias)
        if "added" in self.then:
            y = other + y
        if "shrunk" in self.then:
            y = ops.shrink(y, self.theta, "soft")
        return y.relu() if "relu" in self.then else y


def lowered(model: nn.Module, *inputs: Tensor):
    program = capture(model, inputs).rounded()
    return program, TVMBackend().lower(program, "cpu")


@given(
    st.sampled_from([1, 2, 3, 5, 8, 9, 16, 23, 40]),
    st.integers(1, 130),
    st.integers(1, 100),
    st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    st.booleans(),
    st.sampled_from(["", "added", "added, shrunk", "shrunk", "relu", "added, shrunk, relu"]),
    st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_kernels_are_the_dense_layer(rows, k, n, density, bias, then, seed) -> None:
    x = rand(rows, k, seed=seed) * (torch.rand(rows, k, generator=torch.Generator().manual_seed(seed)) < density)
    model, other = Sparse(n, k, bias, then, seed), rand(rows, n, seed=seed + 5)
    _, built = lowered(model, x, other)
    assert not compare([model(x, other)], built.run((x, other))).exceeds(1e-5)


def test_what_follows_is_part_of_the_kernel() -> None:
    model, x = Sparse(64, 32, True, "added, shrunk"), rand(2, 3, 32)
    _, built = lowered(model, x, rand(2, 3, 64))
    words = [line.split() for line in built.code.as_text().splitlines() if "call" in line]
    kernels = {w for line in words for w in line if w.startswith(("sparse_linear", "fused_", "add", "shrink"))}
    assert kernels == {"sparse_linear"}


@pytest.mark.parametrize("rows", [1, 8, 21])
def test_what_meets_zeros_is_not_read(rows: int) -> None:
    """Weights that are no numbers do not come out, and an input that is none does."""
    x = rand(rows, 64)
    x[:, 8:48] = 0
    model = Sparse(40, 64, True)
    wanted = model(x, x)
    with torch.no_grad():
        model.weight[:, 8:48] = math.nan
    _, built = lowered(model, x, x)
    assert not compare([wanted], built.run((x, x))).exceeds(1e-5)
    x[0, 3] = math.nan
    found = built.run((x, x))[0]
    assert found[0].isnan().all() and not found[1:].isnan().any()


@given(
    st.sampled_from([1, 2, 4, 8, 12]),
    st.sampled_from([16, 48, 50]),
    st.integers(1, 90),
    st.booleans(),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_gated_layers(rows: int, k: int, n: int, bias: bool, seed: int) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(k, n, bias)

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return ops.gated_linear(x, self.layer.weight, self.layer.bias, gate)

    model, x, gate = Gated(), rand(rows, k, seed=seed), rand(rows, n, seed=seed + 1)
    gate = gate * (gate > 0.4)
    _, built = lowered(model, x, gate)
    wanted = gate * F.linear(x, model.layer.weight, model.layer.bias)
    assert not compare([model(x, gate)], [wanted]).exceeds(1e-6)
    assert not compare([wanted], built.run((x, gate))).exceeds(1e-5)


def test_gated_layers_do_not_read_closed_rows() -> None:
    layer, x, gate = nn.Linear(32, 20), rand(2, 32), rand(2, 20)
    gate[:, 4:15] = 0
    wanted = gate * layer(x)
    with torch.no_grad():
        layer.weight[4:15] = math.nan

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return ops.gated_linear(x, self.layer.weight, self.layer.bias, gate)

    _, built = lowered(Gated(), x, gate)
    assert not compare([wanted], built.run((x, gate))).exceeds(1e-5)


def test_other_types_and_gradients() -> None:
    x, w, b, g = (rand(*s, seed=i).double().requires_grad_() for i, s in enumerate([(3, 5), (4, 5), (4,), (3, 4)]))
    assert torch.autograd.gradcheck(ops.sparse_linear, (x, w, b)) and torch.autograd.gradcheck(
        ops.gated_linear, (x, w, b, g)
    )
    model, inputs = Sparse(4, 5, True, "added, shrunk").double(), (x.detach(), g.detach())
    _, built = lowered(model, *inputs)
    assert not compare([model(*inputs)], built.run(inputs)).exceeds(1e-9)
