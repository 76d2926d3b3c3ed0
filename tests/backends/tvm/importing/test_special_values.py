"""NaN, infinities, zeros of both signs, equal elements, and whole numbers that are divided or raised to powers: as torch has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import thresher
from helpers.modules import Function

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(2, 3, 9, 8, generator=GENERATOR)
IMAGE[0, 0, 1, 1] = float("nan")
IMAGE[0, 1] = 0.0
IMAGE[1, 0, :, 2], IMAGE[1, 1, 3] = float("-inf"), float("inf")
IMAGE[1, 2] = IMAGE[1, 2].round()  # equal elements, and zeros of both signs
WHOLE = torch.randint(-9, 9, (4, 6), generator=GENERATOR)
DIVISORS = torch.randint(1, 5, (4, 6), generator=GENERATOR) * torch.tensor([1, -1, 1, -1, 1, -1])

OF_IMAGE: dict[str, Callable[[Tensor], object]] = {
    "amax": lambda x: (x.amax(-1), x.amax((0, 2), keepdim=True), x.amax()),
    "of one number": lambda x: (
        x[0, 0, 0, 0].amax(),
        x[0, 0, 0, 0].sum(0),
        x[0, 0, 0, 0].mean(),
        x[0, 0, 0, 0].amin(0),
    ),
    "amin": lambda x: (x.amin(1), x.amin()),
    "max with index": lambda x: (*x.max(-1), *x.max(0, keepdim=True), x.max()),
    "min with index": lambda x: (*x.min(1), x.min()),
    "argmax": lambda x: (x.argmax(2), x.argmax(-1), x.argmax()),
    "argmin": lambda x: (x.argmin(2), x.argmin(-1, keepdim=True), x.argmin()),
    "sort": lambda x: torch.sort(x, dim=-1, stable=True),
    "sort down": lambda x: torch.sort(x, dim=2, descending=True, stable=True),
    "topk": lambda x: x.topk(3)[0],
    "smallest": lambda x: x.topk(2, 1, largest=False)[0],
    "clamp": lambda x: torch.clamp(x, x.flip(0), x.flip(1)),
    "fmax and fmin": lambda x: (torch.fmax(x, x.flip(0)), torch.fmin(x, x.flip(1))),
    "cummax": lambda x: (*torch.cummax(x, 2), *torch.cummax(x, -1)),
    "cummin": lambda x: torch.cummin(x, 0),
    "logcumsumexp": lambda x: torch.logcumsumexp(x[1, 2:], -1),
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d with indices": lambda x: F.max_pool2d(x, (2, 3), 2, 1, 2, ceil_mode=True, return_indices=True),
    "max_pool1d with indices": lambda x: F.max_pool1d(x[0], 3, 2, return_indices=True),
    "max_pool3d with indices": lambda x: F.max_pool3d(x, 2, return_indices=True),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, (4, 5), return_indices=True),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x, (2, 3, 5)),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x[1:, 2:], 2, return_indices=True), 2, output_size=(9, 8)),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 2), (9, 8), 2),
    "unfold": lambda x: (x.unfold(2, 3, 2), x.permute(0, 2, 1, 3).unfold(3, 8, 5).unfold(1, 9, 4)),
    "searchsorted": lambda x: torch.searchsorted(x[1, 2].sort(-1)[0], x[1, 2].flip(0)),
    "bucketize": lambda x: torch.bucketize(x[1, 2], torch.arange(-3.0, 3.0), right=True),
    "index_reduce": lambda x: x.index_reduce(2, torch.tensor([0, 5, 0]), x[:, :, 6:], "amin"),
    "statistics of a batch": lambda x: (
        F.batch_norm(x[1:, 2:], None, None, training=True),
        torch.var_mean(x[1:, 2:], (0, 2)),
    ),
    "comparisons": lambda x: (x != 0, x != x, x != x.flip(0), x == x.flip(0), x < x.flip(1), x.isnan()),
    "a value beside itself in one kernel": lambda x: (
        x * 2 - x * 2,
        (x + 1) - (x + 1),
        torch.where(x == x, x, 0),
        torch.where(x * 2 != x * 2, 1, x),
        (x + x.flip(0)) - x.flip(0),
    ),
    "rounded by addition": lambda x: (x + 12582912.0) - 12582912.0,
    "conditions": lambda x: (
        torch.where(~(x * 2 < x.flip(0) * 2), x, 1),
        torch.where(torch.logical_not(x < x.flip(1)), 2, x),
        x.half() * 2 - x.half() * 2,
        torch.where(torch.logical_or(x * 2 < x.flip(0), x.flip(0) <= x * 2), x, 7),
        (x < x.flip(0)) | (x.flip(0) <= x),
    ),
    "times and by zero": lambda x: (x * 0, x * -0.0, 0.0 / x, x / 0.0),
    "cat with none": lambda x: torch.cat([x[..., :0], x, x.new_zeros(0), x.double()[..., :2]], -1),
}
OF_WHOLE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "floor": lambda a, b: (a // b, a // 3, torch.div(a, b, rounding_mode="floor")),
    "trunc": lambda a, b: (torch.div(a, b, rounding_mode="trunc"), torch.div(a, -4, rounding_mode="trunc")),
    "remainder": lambda a, b: (a % b, a % -3, torch.fmod(a, b)),
    "power": lambda a, b: (a ** b.abs(), a**b, torch.pow(2, b), a**3, a.int() ** b.int()),
    "shift": lambda a, b: (a << b, a >> b.abs(), a.int() << 40),
    "extrema": lambda a, b: (torch.fmax(a, b), a.amax(0), a.argmin(1), a.cummax(1)[1], torch.sort(a, stable=True)[1]),
    "floating": lambda a, b: (
        (a * 0.7) // (b * 0.5),
        (a * 0.7) % (b * 0.5),
        torch.fmod(a * 0.7, b * 0.5),
        torch.div(a * 0.1, 0.1, rounding_mode="floor"),
    ),
    "one constant": lambda a, b: a + torch.tensor([5]),
}


def check(function: Callable, *inputs: Tensor) -> None:
    model = thresher.compile(Function(function).eval(), inputs, target="cpu", library="never")
    results = torch.utils._pytree.tree_leaves(model(*inputs))
    for result, expected in zip(results, torch.utils._pytree.tree_leaves(function(*inputs)), strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize("name", OF_IMAGE)
def test_images(name: str) -> None:
    check(OF_IMAGE[name], IMAGE)


@pytest.mark.parametrize("name", OF_WHOLE)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_whole_numbers(name: str, dtype: torch.dtype) -> None:
    check(OF_WHOLE[name], WHOLE.to(dtype), DIVISORS.to(dtype))


def test_a_value_beside_itself() -> None:
    """A NaN is not equal to itself."""
    model = thresher.compile(Function(lambda x: (x == x, x <= x, x - x)).eval(), (IMAGE,), target="cpu")
    for result, expected in zip(model(IMAGE), (IMAGE == IMAGE, IMAGE <= IMAGE, IMAGE - IMAGE), strict=True):
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_a_number_is_compared_in_the_dtype_of_the_tensor() -> None:
    check(
        lambda x, number: (x == number, x != number, x > number),
        torch.full((3,), 0.1),
        torch.tensor(0.1, dtype=torch.float64),
    )


def test_a_division_by_zero_does_not_end_the_process() -> None:
    """Eager raises for it; what a kernel gives then is not said, but it is given."""
    model = thresher.compile(
        Function(lambda a, b: (a // b, a % b)).eval(), (WHOLE, DIVISORS), target="cpu", library="never"
    )
    assert [int(v[0, 0]) for v in model(WHOLE, DIVISORS * 0)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_results_keep_their_digits(dtype: torch.dtype) -> None:
    """1 + x and e^x - 1 have few digits of a small x, which the results that depend on it alone must have."""
    x = torch.logspace(-9, 1.4, 100, dtype=dtype)
    x = torch.cat([x, -x])

    def function(x: Tensor) -> dict[str, Tensor]:
        return {
            "log1p": torch.log1p(x),
            "expm1": torch.expm1(x),
            "atanh": torch.atanh(x),
            "tanh": torch.tanh(x),
            "elu": F.elu(x, 1.5),
            "selu": F.selu(x),
            "celu": F.celu(x, 0.7),
            "softplus": F.softplus(x, 1.5),
            "softplus of a large limit": F.softplus(x * 10, 1, 1000),
            "logsigmoid": F.logsigmoid(x),
            "soft_margin_loss": F.soft_margin_loss(x, x.sign(), reduction="none"),
        }

    results = thresher.compile(Function(function).eval(), (x,), target="cpu", library="never")(x)
    for name, expected in function(x).items():
        torch.testing.assert_close(
            results[name], expected, rtol=10 * torch.finfo(dtype).eps, atol=0, equal_nan=True, msg=name
        )


def test_constants_without_elements_are_read_again(tmp_path) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_ones(2, 0), torch.cat([x, x[:0]])

    x = torch.ones(3)
    model = thresher.compile(Function(function).eval(), (x,), target="cpu", library="never")
    for result in (model(x), thresher.load(model.save(tmp_path / "m.thresher"))(x)):
        assert result[0].shape == (2, 0) and torch.equal(result[1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randint(0, 70, (3, 20), generator=torch.Generator().manual_seed(0)) / 7 - 5).to(dtype)

    def function(x: Tensor) -> dict[str, object]:
        return {
            "extrema": (x.max(-1), x.min(0), x.argmax(-1), x.argmin(), x.amax(1)),
            "limits": (F.relu(x), x.clamp(-1, 2), F.hardshrink(x), F.threshold(x, 0.1, 20.0), x.isnan()),
            "smooth": (F.mish(x), F.elu(x), F.softplus(x), torch.expm1(x), torch.tanh(x), F.logsigmoid(x)),
            "wide": (F.relu(x.float() * 1.3), (x.float() * 1.3).exp(), F.silu(x.float()).to(dtype)),
            "norms": (torch.linalg.vector_norm(x, 6), torch.linalg.vector_norm(x * 20, 2, -1)),
            "two": (x.abs().pow(x.flip(0)), x.fmod(x[0]), x.remainder(x[0]), torch.div(x, x[0], rounding_mode="floor")),
            "chain": (F.relu(F.relu(x + 1) * 2 - 1).clamp(0.5, 3).float().exp().to(dtype) * x),
        }

    results = thresher.compile(Function(function).eval(), (x,), target="cpu", library="never")(x)
    for name, expected in function(x).items():
        torch.testing.assert_close(results[name], expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5, msg=name)


def test_a_model_without_inputs_returns_tensors() -> None:
    model = thresher.compile(Function(lambda: torch.arange(3, dtype=torch.bfloat16)).eval(), (), target="cpu")
    assert torch.equal(model(), torch.arange(3, dtype=torch.bfloat16))
