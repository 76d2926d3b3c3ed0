"""The model in float64 as the judge: it excuses what rounding does, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from helpers.modules import Amplifier, Function
from thresher.frontend.capture import capture
from thresher.runtime.comparison import Check, check_outputs
from thresher.verification.truth import SampledTruth, neighbour


class Chaotic(Amplifier):
    """Beside what amplifies rounding a result that it hardly moves."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.amplified(x)
        return y, x.softmax(-1), torch.cat([x.sin(), y], -1)


X = torch.randn(16, 24, generator=torch.Generator().manual_seed(1))


def in_another_order(model: Chaotic, x: Tensor) -> list[Tensor]:
    """The same function, whose sums are in another order."""
    order = torch.arange(x.shape[-1]).flip(0)
    y = x
    for weight in model.weights:
        y = torch.tanh(y[:, order] @ weight[order])
    return [y.detach(), x.softmax(-1), torch.cat([x.sin(), y], -1).detach()]


def judged(model: nn.Module, x: Tensor, candidate: list[Tensor], reference: list[Tensor] | None = None) -> Check:
    program = capture(model, (x,))
    reference = program.run(x) if reference is None else reference
    return check_outputs("x", reference, candidate, truth=lambda: SampledTruth(program, [x]))


def test_rounding_that_a_model_amplifies_is_excused() -> None:
    model = Chaotic()
    other, reference = in_another_order(model, X), capture(model, (X,)).run(X)
    assert not check_outputs("x", reference, other).passed
    check = judged(model, X, other)
    assert check.passed and check.excused and check.ours is not None and check.eager is not None
    assert check.ours > check.tolerance and check.eager > check.tolerance
    assert "rounding explains it" in str(check) and f"{check.ours:.2e}" in str(check)


def plant_in_another_output(outputs: list[Tensor]) -> None:
    outputs[1][0, 0] += 1e-3


def plant_in_another_element(outputs: list[Tensor]) -> None:
    outputs[2][3, 5] += 1e-3


def plant_in_a_chaotic_element(outputs: list[Tensor]) -> None:
    outputs[0][2, 2] += 1.0


def plant_everywhere(outputs: list[Tensor]) -> None:
    outputs[0] *= 1.05


@pytest.mark.parametrize(
    "plant", [plant_in_another_output, plant_in_another_element, plant_in_a_chaotic_element, plant_everywhere]
)
def test_an_error_beside_excused_rounding_is_none(plant: Callable[[list[Tensor]], None]) -> None:
    model = Chaotic()
    other = in_another_order(model, X)
    plant(other)
    check = judged(model, X, other)
    assert not check.passed and "rounding does not explain the result" in check.detail


def test_a_reference_that_is_not_the_captured_model_is_not_excused() -> None:
    """The truth is made of the captured program: where that is wrong, the eager model differs from it, and our code does not."""
    model, other = Chaotic(), Chaotic()
    with torch.no_grad():
        other.weights[-1][0, 0] += 0.5
    wrong = capture(other, (X,)).run(X)
    check = judged(model, X, in_another_order(model, X), reference=wrong)
    assert not check.passed and "rounding does not explain the reference" in check.detail


class Small(nn.Module):
    """Results of 1e-40: float32 has few digits there."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(10)])
        for index, layer in enumerate(self.layers):
            nn.init.normal_(layer.weight, std=1.7e-5, generator=torch.Generator().manual_seed(index))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_subnormal_numbers_are_judged_by_their_own_digits() -> None:
    model, x = Small(), X[:, :16]
    program = capture(model, (x,))
    exact = program.run(x, dtype=torch.float64)[0]
    assert 1e-43 < exact.abs().max() < 1e-39
    rounded = exact.float()
    assert not check_outputs("x", program.run(x), [rounded]).passed
    assert judged(model, x, [rounded]).passed
    assert not judged(model, x, [rounded * 1.1]).passed
    assert not judged(model, x, [torch.zeros_like(rounded)]).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_types(dtype: torch.dtype) -> None:
    model, x = Chaotic(depth=8).to(dtype), X.to(dtype)
    exact = [v.to(dtype) for v in capture(model, (x,)).run(x, dtype=torch.float64)]
    assert judged(model, x, exact).passed
    exact[1] = exact[1] * 1.3
    assert not judged(model, x, exact).passed


class Steps(nn.Module):
    """Whole numbers that rounding decides, and others."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = (x * 0.1).sum(-1) * 1e6
        return total.floor().long(), x.argmax(-1)


def test_whole_numbers_that_rounding_decides() -> None:
    model = Steps()
    program = capture(model, (X,))
    exact = program.run(X, dtype=torch.float64)
    assert not torch.equal(exact[0], program.run(X)[0]) and judged(model, X, exact).passed
    for index, change in ((0, 10_000), (1, 1)):
        wrong = [v.clone() for v in exact]
        wrong[index][0] += change
        assert not judged(model, X, wrong).passed


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x * x / x, x + 0.1])


def test_an_overflow_of_the_model_itself_is_no_licence() -> None:
    """float16 ends at 65,504: whoever gets past it is right, and whoever gives any other number is not."""
    model, x = Overflow(), torch.full((4,), 300.0, dtype=torch.float16)
    program = capture(model, (x,))
    assert program.run(x)[0][:4].isinf().all()
    exact = program.run(x, dtype=torch.float64)[0].half()
    assert judged(model, x, [exact]).passed
    assert judged(model, x, program.run(x)).passed
    for wrong in (17.0, float("nan"), -float("inf")):
        assert not judged(model, x, [torch.cat([torch.full((4,), wrong).half(), exact[4:]])]).passed


def test_in_float64_there_is_no_better_judge() -> None:
    model, x = Chaotic().double(), X.double()
    assert not judged(model, x, [v * (1 + 1e-6) for v in capture(model, (x,)).run(x)]).passed


def test_a_neighbour_keeps_masks_ranges_and_limits() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            limits = torch.finfo(torch.float32)
            self.register_buffer("mask", torch.tensor([0.0, 1.0, limits.min, -torch.inf, limits.max * 0.999999, 0.999]))

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x[index] * self.mask

    program = capture(Masked(), (X[:, :6], torch.tensor([1, 2])))
    for seed in range(6):
        near, (x, index) = neighbour(program, program.probe, seed)
        (mask,) = near.constants.values()
        assert torch.equal(index, program.probe[1])
        assert mask[:4].tolist() == [0.0, 1.0, torch.finfo(torch.float32).min, -torch.inf]
        assert mask[4].isfinite() and mask[5] <= 1
        assert torch.equal(x, X[:, :6]) is (seed == 0) and torch.allclose(x, X[:, :6], rtol=0.04)


def test_a_neighbour_that_the_model_refuses_says_nothing() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[(x * 10).long()] * 0.1

    x = torch.tensor([*torch.linspace(0.05, 0.85, 9), 0.99])  # 1.0 would be behind its end
    truth = SampledTruth(capture(Table(), (x,)), [x])
    while truth.widen():
        pass
    assert truth.runs > 1 and 0 < truth.spread[0].max() < 1e-7


def test_floats_of_eight_bits_have_neighbours() -> None:
    """Torch does not round them."""
    program = capture(Function(lambda x: x.float() * 2), (torch.tensor([0.3, 2.0, -1.1]).to(torch.float8_e4m3fn),))
    _, (x,) = neighbour(program, program.probe, 2)
    assert x.dtype is torch.float8_e4m3fn and float(x[1]) == 2.0
