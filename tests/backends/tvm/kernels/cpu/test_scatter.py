"""Writes at indices, in their order, against torch; sizes may be free."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import thresher
from helpers.modules import Function

HOW = ("sum", "prod", "mean", "amax", "amin")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_scatter_reduce(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    written = [data.draw(st.integers(1, n if d != dim else 60)) for d, n in enumerate(shape)]
    how, own = data.draw(st.sampled_from(HOW)), data.draw(st.booleans())
    torch.manual_seed(0)
    x, index = torch.randn(shape), torch.randint(0, shape[dim], written)
    values = torch.randn([n + data.draw(st.integers(0, 2)) for n in written])
    model = Function(lambda x, i, v: x.scatter_reduce(dim, i, v, how, include_self=own))
    torch.testing.assert_close(
        thresher.compile(model, (x, index, values), passes="none")(x, index, values), model(x, index, values)
    )


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_index_put(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
    dims = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=2))
    count, add = data.draw(st.integers(1, 50)), data.draw(st.booleans())
    torch.manual_seed(0)
    x = torch.randn(shape)
    indices = [torch.randint(-shape[d], shape[d], (count,)) if d in dims else None for d in range(len(shape))]
    values = torch.randn_like(x[tuple(slice(None) if i is None else i for i in indices)])
    model = Function(
        lambda x, v, *i: (
            torch.ops.aten.index_put(x, [next(rest) if d in dims else None for d in range(len(shape))], v, add)
            if (rest := iter(i))
            else x
        )
    )
    args = (x, values, *(i for i in indices if i is not None))
    torch.testing.assert_close(thresher.compile(model, args, passes="none")(*args), model(*args))


def test_edges_of_a_graph() -> None:
    """One kernel that writes each message once; also of a free number of edges."""
    torch.manual_seed(0)
    model = Function(lambda x, source, target: torch.zeros_like(x).index_add(0, target, x[source]))
    x, source, target = torch.randn(50, 8), torch.randint(0, 50, (400,)), torch.randint(0, 50, (400,))
    fixed = thresher.compile(model, (x, source, target))
    assert sum("scatter" in name for name, _ in fixed.executable.kernels) == 1
    edges = torch.export.Dim("edges", min=2, max=1000)
    free = thresher.compile(model, (x, source, target), dynamic_shapes=((None, {0: edges}, {0: edges}),))
    assert sum("scatter" in name for name, _ in free.executable.kernels) == 1
    for n in (400, 7):
        torch.testing.assert_close(free(x, source[:n], target[:n]), model(x, source[:n], target[:n]))
    torch.testing.assert_close(fixed(x, source, target), model(x, source, target))


def test_an_index_outside_writes_nothing() -> None:
    """torch raises there; code that wrote would write somewhere in the memory of the process."""
    model = Function(lambda x, i, j, v: torch.ops.aten.index_put(x, [i, j], v))
    args = (torch.zeros(3, 4), torch.tensor([0, 1]), torch.tensor([1, 2]), torch.ones(2))
    compiled = thresher.compile(model, args)
    outside = (torch.zeros(3, 4), torch.tensor([0, 3]), torch.tensor([4, 0]), torch.ones(2))
    assert not compiled(*outside).any()
