"""Simplification: what does nothing goes, products with constants are linear, equal calls are made once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.canonical import canonical, count
from helpers.modules import Function
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.rewriting.manager import PassManager
from thresher.testing import before_after, refused

aten = torch.ops.aten


def test_no_ops_go() -> None:
    def f(x: Tensor) -> Tensor:
        y = F.dropout(x.clone().detach(), 0.5, False) * 1 + 0
        return y[:, :].view(y.shape).to(torch.float32).contiguous().relu()

    program, _ = canonical(Function(f), torch.randn(2, 6))
    assert [n.target for n in program.calls()] == [aten.relu.default]


def test_parts_become_slices() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, d, e = b.split([1, 1, 1], -1)
        return torch.cat([a * c, d - e], -1) + torch.stack(x.unbind(0)).sum()

    program, _ = canonical(Function(f), torch.randn(2, 6))
    assert count(program, aten.slice.Tensor) >= 4
    assert not any("split" in str(n.target) or "chunk" in str(n.target) for n in program.calls())


@pytest.mark.parametrize("spelling", ["matmul", "mm", "addmm", "einsum"])
def test_products_with_a_constant_are_linear(spelling: str) -> None:
    w, b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = w, b

        def forward(self, x: Tensor) -> Tensor:
            if spelling == "einsum":
                return torch.einsum("ni,io->no", x, self.w)
            return torch.addmm(self.b, x, self.w) if spelling == "addmm" else getattr(torch, spelling)(x, self.w)

    program, _ = canonical(Product(), torch.randn(3, 6))
    assert count(program, aten.linear.default) == 1


def test_what_is_computed_twice_is_computed_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.relu().sum(-1), x.relu().sum(-1)
            return a + b + x.relu().sum(0)

    x = torch.randn(3, 3)
    program = PassManager(["simplify"]).run(capture(Twice(), (x,)))
    targets = [n.target for n in program.calls()]
    assert targets.count(torch.ops.aten.relu.default) == 1 and targets.count(torch.ops.aten.sum.dim_IntList) == 2
    assert torch.equal(program.run(x)[0], Twice()(x))


def test_numbers_of_other_kinds_are_not_the_same() -> None:
    class Kinds(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x + 1, x + 1.0, x.float() / 0.0, x.float() / -0.0]

    x = torch.tensor([1, 2, 3])
    program = PassManager(["simplify"]).run(capture(Kinds(), (x,)))
    for wanted, found in zip(Kinds()(x), program.run(x)):
        assert wanted.dtype is found.dtype and torch.equal(wanted, found)


BEFORE = """\
program model {
  %x = input : f32[2, 6]
  %weight = constant "weight" : f32[3, 5]
  %parts = aten.split.Tensor(%x, 3, 1) : (f32[2, 3], f32[2, 3])
  %a = getitem(%parts, 0) : f32[2, 3]
  %b = aten.clone.default(%a) : f32[2, 3]
  %y = aten.matmul.default(%b, %weight) : f32[2, 5]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 6]
  %weight_t = constant "weight_t" : f32[5, 3]
  %slice = aten.slice.Tensor(%x, 1, 0, 3) : f32[2, 3]
  %linear = aten.linear.default(%slice, %weight_t) : f32[2, 5]
  return [%linear]
}
"""


def test_before_and_after() -> None:
    check_rewrite("simplify", BEFORE, AFTER)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_slope_keeps_the_shape(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, -2.0)
    layer = nn.PReLU()
    (result,) = canonical(layer, x)[0].run(x)
    assert torch.equal(result, layer(x)) and result.shape == shape


def test_parts_whose_sizes_are_computed_stay_a_split() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            first, second = counts.tolist()
            torch._check(first >= 0)
            torch._check(second >= 0)
            torch._check(first + second == x.shape[0])
            some, others = x.split([first, second])
            return some.sum(0) - others.sum(0)

    program = capture(Model(), (torch.randn(6, 4), torch.tensor([2, 4])))
    after = refused("simplify", program).after
    x = torch.randn(6, 4)
    torch.testing.assert_close(after(x, torch.tensor([5, 1])), x[:5].sum(0) - x[5:].sum(0))


def test_an_end_before_the_start_leaves_nothing_of_the_largest() -> None:
    refused("simplify", Function(lambda x: x.topk(3).values[..., 2:-1]), (torch.randn(2, 5),))


def test_notes_are_of_nodes_that_the_program_had() -> None:
    """Two parts that are written as the same slice are computed once, and the note of that is the note of the parts."""
    outcome = before_after("simplify", Function(lambda x: x.split(2, 1)[0] + x.chunk(2, 1)[0]), (torch.randn(3, 4),))
    names = {node.name for node in outcome.before.graph.nodes}
    assert outcome.changed and {note.node for note in outcome.rewrites} <= names


KTH = """\
program model {
  %x = input : f32[2, 6]
  %largest = aten.topk.default(%x, 3DIM) : (f32[2, 3], i64[2, 3])
  %values = getitem(%largest, 0) : f32[2, 3]
  %last = aten.slice.Tensor(%values, SLICE) : f32[2, 1]
  return [%last]
}
"""
KTH_AFTER = """\
program model {
  %x = input : f32[2, 6]
  %last = thresher.kth_largest.default(%x, 3) : f32[2, 1]
  return [%last]
}
"""


@pytest.mark.parametrize("dim", ["", ", -1", ", 1"])
@pytest.mark.parametrize("part", ["-1, 2, 3", "1, -1", "1, 2, 9223372036854775807"])
def test_the_last_of_the_largest(dim: str, part: str) -> None:
    check_rewrite("simplify", KTH.replace("DIM", dim).replace("SLICE", part), KTH_AFTER)


def test_a_conversion_to_the_same_type_goes() -> None:
    check_rewrite(
        "simplify",
        """\
program model {
  %x = input : f32[2, 6]
  %same = aten._to_copy.default(%x, dtype=torch.float32) : f32[2, 6]
  %y = aten.relu.default(%same) : f32[2, 6]
  return [%y]
}
""",
        """\
program model {
  %x = input : f32[2, 6]
  %y = aten.relu.default(%x) : f32[2, 6]
  return [%y]
}
""",
    )


def test_a_mask_that_is_also_the_values_stays_expanded() -> None:
    """Values do not broadcast over the queries by themselves."""
    attend = lambda q, m: F.scaled_dot_product_attention(q, q, m.expand(2, 3, 4, 4), m.expand(2, 3, 4, 4))  # noqa: E731
    program, _ = canonical(Function(attend), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 1, 4))
    (site,) = program.calls(aten.scaled_dot_product_attention.default)
    assert [n.target for n in site.args[2:4]] == [aten.expand.default] * 2


def test_a_mask_broadcasts_by_itself() -> None:
    attend = lambda q, m: F.scaled_dot_product_attention(q, q, q, m.expand(2, 3, 4, 4))  # noqa: E731
    program, _ = canonical(Function(attend), torch.randn(2, 3, 4, 4), torch.randn(2, 1, 1, 4))
    assert not count(program, aten.expand.default)
