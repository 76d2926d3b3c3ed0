"""fold-channels beyond convolutions and attention: recurrent cells, experts, bilinear, 1-d and 3-d, unequal groups and heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.folds import IMAGE, Net, fold, kill, shapes
from thresher.analysis.cost.cost import count_flops
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_hidden_units_of_a_recurrent_layer(kind: type, gates: int) -> None:
    """A unit that neither the head nor the recurrence reads goes, in all gates and all steps at once."""
    net = Net(lambda s, x: s.head(s.cell(x)[0]), cell=kind(5, 6, batch_first=True), head=nn.Linear(6, 3))
    kill(net.head.weight, 1, 4, dim=1)
    kill(net.cell.weight_hh_l0, 1, 4, dim=1)
    folded, _ = fold(net, torch.randn(2, 4, 5))
    assert shapes(folded)["head.weight"] == (3, 4)
    assert shapes(folded)["cell.weight_ih_l0"] == (4 * gates, 5)
    assert shapes(folded)["cell.weight_hh_l0"] == (4 * gates, 4)


class Experts(nn.Module):
    """A dense mixture: softmax over the routes, every expert weighted by its share."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.router(x), -1)
        return sum(share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


def test_an_expert_that_no_route_reaches() -> None:
    """A pruner closes a route with a bias of minus infinity."""
    model = Experts()
    with torch.no_grad():
        model.router.weight[2], model.router.bias[2] = 0, -torch.inf
    folded, _ = fold(model, torch.randn(3, 6))
    left = {name for name in shapes(folded) if name.startswith("experts")}
    assert not any(name.startswith("experts.2") for name in left)
    assert any(name.startswith("experts.3") for name in left)


def test_bilinear() -> None:
    net = Net(
        lambda s, x: s.c(s.n(s.a(x), s.b(x)).relu()),
        a=nn.Linear(5, 6),
        b=nn.Linear(5, 7),
        n=nn.Bilinear(6, 7, 8),
        c=nn.Linear(8, 2),
    )
    kill(net.a.weight, 1)
    kill(net.a.bias, 1)
    kill(net.b.weight, 2)  # a constant other than 0: stays
    kill(net.n.weight, 4, dim=2)
    kill(net.n.weight, 0, 3)
    folded, _ = fold(net, torch.randn(3, 5))
    assert shapes(folded)["n.weight"] == (6, 5, 6)
    assert shapes(folded)["a.weight"] == (5, 5)


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims: int) -> None:
    conv, pool = (nn.Conv1d, F.max_pool1d) if dims == 1 else (nn.Conv3d, F.max_pool3d)
    transposed = nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose3d
    net = Net(
        lambda s, x: s.c(s.b(pool(s.a(x).relu(), 2))),
        a=conv(3, 8, 3, padding=1),
        b=transposed(8, 6, 2, stride=2),
        c=conv(6, 4, 1),
    )
    kill(net.a.weight, 1, 5)
    kill(net.c.weight, 2, dim=1)
    folded, _ = fold(net, torch.randn(1, 3, *[8] * dims))
    assert shapes(folded)["a.weight"][:2] == (6, 3)
    assert shapes(folded)["b.weight"][:2] == (6, 5)


def test_unequal_positions_per_group_are_packed() -> None:
    net = Net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu()),
        a=nn.Conv2d(3, 12, 1, bias=False),
        b=nn.Conv2d(12, 8, 3, groups=4, bias=False),
        c=nn.Conv2d(8, 2, 1),
    )
    kill(net.a.weight, 0, 4, 8, 9)  # one of groups 0, 1 and 2, at other places, and one of group 3
    kill(net.b.weight, 1, 2, 5, 6)  # one output of each group
    folded, record = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (4, 2, 3, 3)
    assert shapes(folded)["a.weight"] == (8, 3, 1, 1)
    assert shapes(folded)["c.weight"] == (2, 4, 1, 1)
    assert record.refusals == []


def test_depthwise_multiplier() -> None:
    net = Net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu()),
        a=nn.Conv2d(3, 6, 1, bias=False),
        b=nn.Conv2d(6, 12, 3, groups=6, bias=False),
        c=nn.Conv2d(12, 2, 1),
    )
    kill(net.a.weight, 1, 4)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (8, 1, 3, 3)


def with_edge_markers(net: nn.Module, *args: Tensor):
    """Return the program before and after a fold with an edge marker wherever it saves anything."""
    before = PassManager(pipelines.canonicalize, "off").run(capture(net.eval(), args))
    after = FoldChannels(min_improvement=0.0, round_to=1).apply(before, Context()).program.verify()
    assert not compare_programs(observe(before), after).exceeds(EXACT_TOLERANCE)
    return before, after


def test_heads_with_unequal_dead_positions() -> None:
    """The reshape into heads keeps them; the projection in front is narrow all the same."""

    def forward(s: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(2, 5, 4, 4).transpose(1, 2) for layer in (s.q, s.k, s.v))
        return s.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16))

    net = Net(forward, out=nn.Linear(16, 8), **{n: nn.Linear(8, 16) for n in "qkv"})
    dead = (0, 5, 10, 14, 15)
    kill(net.v.weight, *dead)
    kill(net.v.bias, *dead)
    _, after = with_edge_markers(net, torch.randn(2, 5, 8))
    assert shapes(after)["v.weight"] == (11, 8)
    assert shapes(after)["out.weight"] == (8, 11)


def test_one_sided_residual_with_a_constant() -> None:
    """The dead channels of the branch are constants: they are filled in where the sum needs them."""
    net = Net(
        lambda s, x: s.c(F.relu(s.a(x) + s.b(x))),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 8, 3, padding=1),
        c=nn.Conv2d(8, 4, 1),
    )
    kill(net.b.weight, 1, 4, 6)
    before, after = with_edge_markers(net, torch.randn(*IMAGE))
    assert shapes(after)["b.weight"] == (5, 3, 3, 3)
    assert count_flops(after) < count_flops(before)


def test_a_reader_that_skips_channels_gets_fewer() -> None:
    net = Net(
        lambda s, x: (s.b(s.a(x)), s.c(s.a(x))),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(8, 4, 3),
        c=nn.Conv2d(8, 4, 1),
    )
    kill(net.b.weight, 2, 3, 7, dim=1)
    _, after = with_edge_markers(net, torch.randn(*IMAGE))
    assert shapes(after)["b.weight"] == (4, 5, 3, 3)
    assert shapes(after)["c.weight"] == (4, 8, 1, 1)


def test_the_output_of_the_model_is_filled_in() -> None:
    net = Net(lambda s, x: s.a(x), a=nn.Linear(64, 64))
    kill(net.a.weight, 3, 9)
    _, after = with_edge_markers(net, torch.randn(3, 64))
    assert shapes(after)["a.weight"] == (62, 64)


@pytest.mark.parametrize(("dead", "kept"), [(3, 64), (15, 49), (16, 48), (18, 48)])
def test_widths_are_padded_up_to_the_tile(dead: int, kept: int) -> None:
    """61 and 46 fill their last tile of 16; 49 would become 64, which is too many more."""
    net = Net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(8, 64), b=nn.Linear(64, 4))
    kill(net.a.weight, *range(dead))
    program = capture(net.eval(), (torch.randn(3, 8),))
    folded = FoldChannels().apply(program, Context()).program
    assert shapes(folded)["a.weight"][0] == kept


@pytest.mark.parametrize("dead", [(0, 4), (1, 2, 6)])
def test_channel_shuffle_as_one_operator(dead: tuple[int, ...]) -> None:
    """Cut where the groups stay balanced; right wherever it cannot be."""
    net = Net(
        lambda s, x: s.b(s.m(s.a(x))), a=nn.Conv2d(3, 8, 1, bias=False), m=nn.ChannelShuffle(2), b=nn.Conv2d(8, 4, 1)
    )
    kill(net.a.weight, *dead)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["a.weight"][0] == 6


@pytest.mark.parametrize("dims", [(1,), None])
def test_roll_over_dead_channels(dims: tuple[int, ...] | None) -> None:
    """It follows what is kept, also where export writes the flattened value as a roll of its own."""
    net = Net(lambda s, x: s.b(torch.roll(s.a(x), 3, dims)), a=nn.Linear(6, 8, bias=False), b=nn.Linear(8, 4))
    kill(net.a.weight, 1, 6, 7)
    folded, _ = fold(net, torch.randn(1, 6))
    assert shapes(folded)["a.weight"][0] == 5
