"""Products by expert: every routing against the reference, and that an expert that no row takes is not read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.verification.compare import LOWERING_TOLERANCE, compare

ops = torch.ops.thresher


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Experts(nn.Module):
    def __init__(self, experts: int, n: int, k: int, bias: bool, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter((rand(experts, n, k) / math.sqrt(k)).to(dtype))
        self.bias = nn.Parameter(rand(experts, n, seed=1).to(dtype)) if bias else None

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        return ops.expert_linear(x, experts, self.weight, self.bias)


def each_row_by_itself(model: Experts, x: Tensor, experts: Tensor) -> Tensor:
    """The definition, row by row in float64."""
    shape = torch.broadcast_shapes(x.shape[:-1], experts.shape)
    rows = x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]).double()
    weight, values = model.weight.double(), []
    for row, expert in zip(rows, experts.expand(shape).reshape(-1).tolist(), strict=True):
        inside = 0 <= expert < len(weight)
        term = 0 if model.bias is None or not inside else model.bias[expert].double()
        values.append(weight[expert] @ row + term if inside else torch.zeros(weight.shape[1]).double())
    return torch.stack(values).reshape(*shape, -1)


def built(program: Program, *inputs: Tensor) -> list[Tensor]:
    return TVMBackend().lower(program.rounded(), "cpu").run(inputs)


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([1, 5, 31, 32, 33, 70]),
    st.sampled_from([1, 4, 7, 64, 90]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=16, deadline=None)
def test_each_row_takes_its_expert(tokens, choices, experts, n, k, bias, once, seed) -> None:
    """Rows of a token given once or for each of its choices, numbers that are no expert's among them."""
    model = Experts(experts, n, k, bias)
    x = rand(tokens, 1 if once else choices, k, seed=seed)
    routes = torch.randint(-1, experts + 1, (tokens, choices), generator=torch.Generator().manual_seed(seed))
    wanted = each_row_by_itself(model, x, routes)
    with torch.no_grad():
        assert not compare([wanted], [model(x, routes)]).exceeds(1e-5)
    assert not compare([wanted], built(capture(model, (x, routes)), x, routes)).exceeds(1e-5)


@pytest.mark.parametrize(
    ("x", "routes"), [((6, 8), (6,)), ((8,), (5, 3)), ((2, 3, 1, 8), (2, 3, 4)), ((4, 1, 8), (3,))]
)
def test_shapes_are_broadcast(x: tuple[int, ...], routes: tuple[int, ...]) -> None:
    model, x, routes = Experts(4, 6, 8, True), rand(*x), torch.arange(math.prod(routes)).reshape(routes) % 4
    assert not compare([each_row_by_itself(model, x, routes)], built(capture(model, (x, routes)), x, routes)).exceeds(
        1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    model, x, routes = Experts(3, 6, 8, True, dtype), rand(5, 1, 8).to(dtype), torch.arange(10).reshape(5, 2) % 4
    outputs = built(capture(model, (x, routes)), x, routes)
    assert outputs[0].dtype is dtype
    assert not compare([each_row_by_itself(model, x, routes)], outputs).exceeds(LOWERING_TOLERANCE[dtype])


def test_a_free_number_of_tokens() -> None:
    model, x, routes = Experts(3, 6, 8, True), rand(5, 1, 8), torch.arange(10).reshape(5, 2) % 3
    tokens = torch.export.Dim("tokens", min=2)
    program = capture(model, (x, routes), dynamic_shapes=({0: tokens}, {0: tokens}))
    executable = TVMBackend().lower(program.rounded(), "cpu")
    for count in (2, 9):
        x, routes = rand(count, 1, 8), torch.arange(2 * count).reshape(count, 2) % 3
        assert not compare([model(x, routes)], executable.run((x, routes))).exceeds(1e-5)


def test_an_expert_that_no_row_takes_is_not_read() -> None:
    model, x, routes = Experts(3, 40, 16, True), rand(9, 16), torch.tensor([0, 2, 2, 0, 0, 2, 2, 2, 0])
    with torch.no_grad():
        wanted = model(x, routes)
        model.weight[1], model.bias[1] = math.nan, math.nan
    assert not compare([wanted], built(capture(model, (x, routes)), x, routes)).exceeds(1e-5)


def test_gradients() -> None:
    x, weight, bias = (rand(*shape).double().requires_grad_() for shape in ((3, 1, 5), (4, 2, 5), (4, 2)))
    routes = torch.tensor([[0, 1], [3, 1], [4, 0]])
    assert torch.autograd.gradcheck(lambda a, b, c: ops.expert_linear(a, routes, b, c), (x, weight, bias))
