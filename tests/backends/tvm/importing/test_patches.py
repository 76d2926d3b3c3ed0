"""torch's unfold and fold: a kernel each, over geometries whose windows overlap, leave gaps, and leave the image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import fold, unfold

import thresher
from helpers.modules import Function
from thresher.backends.tvm.importing.converters.patches import grid_of


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    kernel, stride, dilation, padding = (
        data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))
        for least, most in ((1, 4), (1, 5), (1, 3), (0, 2))
    )
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    assume(all(n > 0 for n in grid_of(size, kernel, dilation, padding, stride)))
    lead = data.draw(st.sampled_from([(), (1,), (3,)]))
    torch.manual_seed(0)
    x = torch.randn(*lead, 2, *size)
    model = Function(
        lambda x: (c := unfold(x, kernel, dilation, padding, stride), fold(c, size, kernel, dilation, padding, stride))
    )
    for ours, eager in zip(thresher.compile(model, (x,), passes="none")(x), model(x)):
        torch.testing.assert_close(ours, eager)


def test_a_kernel_each_and_a_free_batch() -> None:
    model = Function(lambda x: fold(unfold(x, 3, padding=1).sin(), (9, 7), 3, padding=1))
    compiled = thresher.compile(
        model, (torch.randn(2, 3, 9, 7),), dynamic_shapes=(({0: torch.export.Dim("batch", max=8)},),)
    )
    names = " ".join(name for name, _ in compiled.executable.kernels)
    assert names.count("im2col") == names.count("col2im") == 1 and "index" not in names
    for batch in (1, 5):
        x = torch.randn(batch, 3, 9, 7)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    """Sums of bfloat16 are computed in float32 and rounded once."""
    torch.manual_seed(0)
    x = torch.randn(1, 2 * 9, 25, dtype=dtype)
    model = Function(lambda x: fold(x, (7, 7), 3))
    torch.testing.assert_close(thresher.compile(model, (x,))(x), model(x.double()).to(dtype))
