"""The k-th largest: by bits, against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.modules import Function
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager

kth_largest = torch.ops.thresher.kth_largest


@given(st.integers(1, 3), st.integers(1, 70), st.data(), st.booleans(), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_kernels(rows: int, size: int, data: st.DataObject, wide: bool, seed: int) -> None:
    k = data.draw(st.integers(1, size))
    x = torch.randn(2, rows, size, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    x[0, 0, 0] = torch.inf
    x = x.double() if wide else x
    wanted = x.sort(-1, descending=True).values[..., k - 1 : k]
    assert torch.equal(kth_largest(x, k), wanted)
    program = capture(Function(lambda x: kth_largest(x, k)), (x,))
    assert torch.equal(TVMBackend().lower(program, "cpu").run((x,))[0], wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.topk(3, -1).values[..., -1:],
        lambda x: x.topk(3).values[..., 2:3],
        lambda x: x.topk(3, -1)[0][:, 2:],
    ],
)
def test_spellings(function) -> None:
    x = torch.randn(4, 9)
    program = PassManager(pipelines.canonicalize).run(capture(Function(function), (x,)))
    assert [n.target for n in program.calls()] == [kth_largest.default]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.topk(3, -1).values[..., 1:2],
        lambda x: x.topk(3, -1, largest=False).values[..., -1:],
        lambda x: x.topk(3, 0).values[-1:],
        lambda x: x.topk(3, -1).values[-1:],
    ],
)
def test_what_is_something_else(function) -> None:
    x = torch.randn(4, 9)
    program = PassManager(pipelines.canonicalize).run(capture(Function(function), (x,)))
    assert not list(program.calls(kth_largest.default)) and torch.equal(program.run(x)[0], function(x))


def test_too_many() -> None:
    with pytest.raises(ValueError, match="k = 5 of 4"):
        kth_largest(torch.ones(4), 5)
