"""Products with pruned weights: every layout against the dense layer, and that zeros are neither stored nor read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thresher.backends.tvm import TVMBackend
from thresher.backends.tvm.cpu import CpuInfo
from thresher.backends.tvm.kernels.cpu.pruned_linear import STEP, pack, width_of
from thresher.frontend.capture import capture
from thresher.ops.pruned_linear import LAYOUTS
from thresher.verification.compare import compare

ops = torch.ops.thresher


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pruned(nn.Module):
    def __init__(self, weight: Tensor, bias: bool, layout: str, then: str = ""):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(rand(len(weight), seed=9)) if bias else None
        self.layout, self.then = layout, then

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = ops.pruned_linear(x, self.weight, self.bias, self.layout)
        return (other + y).relu() if self.then else y


@given(
    st.sampled_from([1, 2, 3, 7, 8, 9, 20, 70, 150]),
    st.integers(1, 90),
    st.integers(1, 100),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=16, deadline=None)
def test_kernels_are_the_dense_layer(rows, k, n, layout, density, bias, then, seed) -> None:
    weight = rand(n, k, seed=seed) * (torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density)
    model, x, other = Pruned(weight, bias, layout, "then" if then else ""), rand(rows, k, seed=seed + 1), rand(rows, n)
    built = TVMBackend().lower(capture(model, (x, other)).rounded(), "cpu")
    assert not compare([model(x, other)], built.run((x, other))).exceeds(1e-5)


ACTIVATIONS = {
    "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-0.5, 0.75), "gelu": nn.GELU(), "tanh gelu": nn.GELU("tanh"), "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_part_of_the_kernel(name: str) -> None:
    class Model(Pruned):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return ACTIVATIONS[name](super().forward(x, other))

    model, x, other = Model(rand(24, 40), True, "rows"), 2 * rand(20, 40), rand(20, 24)
    x[0, 0] = math.nan
    backend = TVMBackend()
    built = backend.lower(capture(model, (x, other)).rounded(), "cpu")
    assert not compare([model(x, other)[1:]], [built.run((x, other))[0][1:]]).exceeds(1e-5)
    assert built.run((x, other))[0][0].isnan().all()


@pytest.mark.parametrize(("layout", "rows"), [("rows", 1), ("rows", 5), ("panels", 1), ("panels", 9), ("runs", 1)])
def test_what_is_pruned_is_not_read(layout: str, rows: int) -> None:
    """Inputs whose weights are all 0 may be no numbers."""
    weight, x = rand(40, 64), rand(rows, 64)
    weight[:, 16:48] = 0
    model, other = Pruned(weight, True, layout), rand(rows, 40)
    wanted = model(x, other)
    x[:, 16:48] = math.nan
    built = TVMBackend().lower(capture(model, (x, other)).rounded(), "cpu")
    assert not compare([wanted], built.run((x, other))).exceeds(1e-5)


def test_what_is_stored() -> None:
    weight, machine = np.zeros((64, 48), np.float32), CpuInfo(lanes=8, registers=16, threads=2)
    weight[:32, 3], weight[5, 16:24] = 1.0, 2.0
    rows, panels, runs = (pack(weight, layout, machine) for layout in ("rows", "panels", "runs"))
    assert rows.values.shape == (32 * 8 + 8, 1) and rows.start[-1] == len(rows.values)
    assert panels.values.shape == ((STEP + 3 * STEP), 16) and set(panels.index) >= {3, *range(16, 24)}
    assert runs.values.shape[1] == 8 and sorted(set(runs.index)) == [0, 16]
    for packed in (rows, panels, runs):
        assert packed.shares[0] == 0 and packed.shares[-1] == len(packed.start) - 1
        assert (np.diff(packed.shares) >= 0).all()
    assert [width_of(m, 16) for m in (1, 3, 5, 8, 9, 100)] == [4, 4, 8, 8, 16, 16]


def test_threads_have_equal_shares() -> None:
    weight = np.ones((128, 64), np.float32)
    weight[64:] = 0
    packed = pack(weight, "rows", CpuInfo(threads=2))
    first = packed.start[packed.shares[1]]
    assert first == pytest.approx(packed.start[-1] / 2, rel=0.05)


def test_other_types_and_bad_layouts() -> None:
    x, w = rand(3, 5).double().requires_grad_(), rand(4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ops.pruned_linear(a, b, None, "rows"), (x, w))
    with pytest.raises(ValueError, match="unknown layout 'best'"):
        ops.pruned_linear(x, w, None, "best")
