"""The vectorised elementary functions over the whole range of float32, its ends included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from thresher.backends.tvm.importing.converters.elementwise import compact

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


@given(
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    inside=st.integers(1, 6),
    period=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_a_compacted_constant_image_is_the_image(before: int, after: int, inside: int, period: int, seed: int) -> None:
    """One dimension with a border, one that repeats itself, one without order."""
    random = np.random.default_rng(seed)
    rows = [*range(before), *[before] * inside, *range(before + 1, before + 1 + after)]
    columns = [i % period for i in range(7)]
    image = random.standard_normal((before + 1 + after, period, 3, 4)).astype(np.float32)[rows][:, columns]
    table, places = compact(image)

    def found(place: Callable, index: int) -> int:
        return int(tvm.sym.Analyzer().simplify(place(tvm.tirx.IntImm("int64", index))))

    assert table.shape[1] == period and table.shape[0] <= before + 1 + after
    indices = [[found(p, i) for i in range(size)] for p, size in zip(places, image.shape)]
    np.testing.assert_array_equal(table[np.ix_(*indices, range(4))], image)


def test_a_bias_map_is_part_of_the_convolution_and_stored_once() -> None:
    """Folded channels that were constant leave a map behind the next padded convolution: its interior is one vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[8:] = 0
        model[0].bias.abs_()
    x = torch.randn(1, 8, 32, 32)
    compiled = thresher.compile(model, (x,), tune="never")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    sizes = {w.shape for w in compiled.executable.weights}
    assert (1, 3, 3, 16) in sizes and (1, 30, 30, 16) not in sizes


@pytest.mark.timeout(60)
def test_smooth_functions_behind_each_other_are_not_put_into_one_expression() -> None:
    """Four of them took minutes to compile; it is 2 seconds."""
    model = nn.Sequential(
        nn.Linear(8, 8), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Softplus(), nn.Linear(8, 4)
    ).eval()
    x = torch.randn(3, 8)
    compiled = thresher.compile(model, (x,), target="cpu")
    torch.testing.assert_close(compiled(x), model(x).detach(), rtol=1e-4, atol=1e-6)
