"""fold-channels, structure by structure: what it must cut, what it must refuse and why, and that it is always exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.folds import IMAGE, Net, fold, kill, shapes
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher import models
from thresher.analysis.cost.cost import count_flops
from thresher.analysis.slices.channels import ChannelAnalysis
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_hidden_units_of_an_mlp() -> None:
    net = Net(lambda s, x: s.b(F.gelu(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    kill(net.a.weight, 1, 5)
    kill(net.a.bias, 1, 5)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded) == {"a.weight": (6, 6), "a.bias": (6,), "b.weight": (4, 6), "b.bias": (4,)}


def test_known_constant_moves_into_the_next_bias() -> None:
    """A dead unit with a bias is a constant, not a zero."""
    net = Net(lambda s, x: s.b(F.gelu(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 4, bias=False))
    kill(net.a.weight, 2)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (7, 6)
    assert (4,) in shapes(folded).values()  # the bias that b did not have


def test_a_slice_without_elements_stays_and_so_does_what_it_is_cut_from() -> None:
    """A model has one where the size of a part is 0 by its configuration."""

    def forward(s: Net, x: Tensor) -> Tensor:
        hidden = s.a(x).relu()
        return s.b(torch.cat([hidden, hidden[:, 8:].reshape(3, 1, 0).flatten(1)], 1))

    net = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    kill(net.a.weight, 1)
    kill(net.a.bias, 1)
    kill(net.b.weight, 0)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (8, 6)


def test_unread_units_go() -> None:
    """The producer is alive, but no consumer has a weight for it."""
    net = Net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    kill(net.b.weight, 0, 7, dim=1)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (6, 6)


def test_padded_convolution_gets_a_bias_map() -> None:
    """A constant channel before a padded convolution leaves a term that differs at the border."""
    net = Net(lambda s, x: s.b(s.a(x).relu()), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 5, 3, padding=1))
    kill(net.a.weight, 1, 4)
    with torch.no_grad():
        net.a.bias.fill_(0.7)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (5, 6, 3, 3)
    assert (1, 5, 7, 7) in shapes(folded).values()


def test_residual_folds_only_where_both_sides_are_dead() -> None:
    net = Net(
        lambda s, x: s.c(F.relu(s.a(x) + s.b(x))),
        a=nn.Conv2d(3, 8, 1, bias=False),
        b=nn.Conv2d(3, 8, 1, bias=False),
        c=nn.Conv2d(8, 4, 1),
    )
    kill(net.a.weight, 1, 2, 3)
    kill(net.b.weight, 2, 3, 4)
    folded, record = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["c.weight"] == (4, 6, 1, 1)
    assert [n.message for n in record.refusals] == [
        "1 of 8 dead outputs kept: held by add (aten.add.Tensor)",
        "1 of 8 dead outputs kept: held by add (aten.add.Tensor)",
    ]


def test_dead_branch_disappears() -> None:
    net = Net(
        lambda s, x: s.c(x + s.b(F.relu(s.a(x)))),
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 3, 1),
        c=nn.Conv2d(3, 4, 1),
    )
    kill(net.b.weight, 0, 1, 2)
    kill(net.b.bias, 0, 1, 2)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded) == {"c.weight": (4, 3, 1, 1), "c.bias": (4,)}
    assert len(list(folded.calls())) == 1


def test_depthwise_and_pool_and_flatten_into_linear() -> None:
    net = Net(
        lambda s, x: s.d(F.max_pool2d(s.b(s.a(x).relu()).relu(), 2).flatten(1)),
        a=nn.Conv2d(3, 8, 3, padding=1, bias=False),
        b=nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        d=nn.Linear(8 * 16, 5),
    )
    kill(net.a.weight, 0, 3, 6)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (5, 1, 3, 3)
    assert shapes(folded)["d.weight"] == (5, 80)


def test_grouped_convolution_loses_whole_groups_and_equal_positions() -> None:
    net = Net(
        lambda s, x: s.b(s.a(x).relu()), a=nn.Conv2d(3, 12, 1, bias=False), b=nn.Conv2d(12, 8, 3, groups=4, bias=False)
    )
    kill(net.a.weight, 3, 4, 5)  # all inputs of group 1: its outputs are constant, but the graph's output keeps them
    kill(net.a.weight, 0, 6, 9)  # position 0 of the other groups
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["a.weight"] == (8, 3, 1, 1)
    assert shapes(folded)["b.weight"] == (8, 2, 3, 3)


def test_transposed_convolution() -> None:
    net = Net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu()),
        a=nn.Conv2d(3, 8, 1, bias=False),
        b=nn.ConvTranspose2d(8, 6, 3, 2, 1, bias=False),
        c=nn.Conv2d(6, 4, 1),
    )
    kill(net.a.weight, 1, 2)
    kill(net.b.weight, 0, 5, dim=1)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (6, 4, 3, 3)
    assert shapes(folded)["c.weight"] == (4, 4, 1, 1)


def test_concat_and_split() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = torch.cat([s.a(x).relu(), s.b(x).relu()], 1)
        first, second = y.split([6, 6], 1)
        return s.c(first) + s.d(second)

    net = Net(
        forward,
        a=nn.Conv2d(3, 8, 1, bias=False),
        b=nn.Conv2d(3, 4, 1, bias=False),
        c=nn.Conv2d(6, 2, 1),
        d=nn.Conv2d(6, 2, 1),
    )
    kill(net.a.weight, 1, 7)
    kill(net.b.weight, 0)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert (shapes(folded)["a.weight"][0], shapes(folded)["b.weight"][0]) == (6, 3)
    assert (shapes(folded)["c.weight"][1], shapes(folded)["d.weight"][1]) == (5, 4)


def test_squeeze_excitation() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x).relu()
        gate = torch.sigmoid(s.up(s.down(y.mean((2, 3), keepdim=True)).relu()))
        return s.c(y * gate)

    net = Net(
        forward,
        a=nn.Conv2d(3, 8, 3, bias=False),
        down=nn.Conv2d(8, 4, 1),
        up=nn.Conv2d(4, 8, 1),
        c=nn.Conv2d(8, 5, 1),
    )
    kill(net.a.weight, 0, 4)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["up.weight"] == (6, 4, 1, 1)
    assert shapes(folded)["down.weight"] == (4, 6, 1, 1)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_heads(fused: bool) -> None:
    """A head whose values are zero goes with its queries and keys."""
    torch.manual_seed(0)
    heads, width = 4, 3

    def forward(s: Net, x: Tensor) -> Tensor:
        if fused:
            q, k, v = s.qkv(x).view(2, 5, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (layer(x).view(2, 5, heads, width).transpose(1, 2) for layer in (s.q, s.k, s.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return s.out(y.transpose(1, 2).reshape(2, 5, heads * width))

    size = heads * width
    layers = {"qkv": nn.Linear(size, 3 * size)} if fused else {n: nn.Linear(size, size) for n in "qkv"}
    net = Net(forward, out=nn.Linear(size, size), **layers)
    dead = range(width, 2 * width)
    values, offset = (net.qkv, 2 * size) if fused else (net.v, 0)
    kill(values.weight, *(offset + i for i in dead))
    kill(values.bias, *(offset + i for i in dead))
    folded, _ = fold(net, torch.randn(2, 5, size))
    expected = (
        {"qkv.weight": (3 * (size - width), size)} if fused else {f"{n}.weight": (size - width, size) for n in "qkv"}
    )
    assert expected.items() <= shapes(folded).items()
    assert shapes(folded)["out.weight"] == (size, size - width)


def test_grouped_query_heads() -> None:
    """A key head goes when all the query heads that share it go."""
    model = models.Llama(50, 32, 1, 4, 2, 40)
    kill(model.blocks[0].o_proj.weight, *range(16), dim=1)  # query heads 0 and 1, which share key head 0
    folded, _ = fold(model, torch.randint(0, 50, (1, 6)))
    assert shapes(folded)["blocks.0.q_proj.weight"] == (16, 32)
    assert shapes(folded)["blocks.0.k_proj.weight"] == shapes(folded)["blocks.0.v_proj.weight"] == (8, 32)


def test_query_and_key_channels() -> None:
    """A channel of the score product goes when the queries have zeros there; the scale stays the old one."""

    def forward(s: Net, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(layer(x).view(1, 5, 2, 4).transpose(1, 2) for layer in (s.q, s.k, s.v)))

    net = Net(forward, q=nn.Linear(8, 8, bias=False), k=nn.Linear(8, 8), v=nn.Linear(8, 8))
    kill(net.q.weight, 1, 5)  # channel 1 of both heads
    folded, _ = fold(net, torch.randn(1, 5, 8))
    assert shapes(folded)["k.weight"] == (6, 8)


def test_channel_shuffle_keeps_balanced_groups() -> None:
    net = Net(
        lambda s, x: s.b(s.a(x).relu().view(2, 2, 4, 9, 9).transpose(1, 2).reshape(2, 8, 9, 9)),
        a=nn.Conv2d(3, 8, 1, bias=False),
        b=nn.Conv2d(8, 4, 1),
    )
    kill(net.a.weight, 1, 5)  # the same place in both groups
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["b.weight"] == (4, 6, 1, 1)


def test_embedding_width() -> None:
    net = Net(lambda s, i: s.a(s.e(i)), e=nn.Embedding(10, 6), a=nn.Linear(6, 4))
    kill(net.e.weight, 2, 3, dim=1)
    folded, _ = fold(net, torch.randint(0, 10, (2, 5)))
    assert shapes(folded)["e.weight"] == (10, 4)


def test_prelu_and_a_concatenated_single_channel() -> None:
    """Slopes stand along dimension 1, also where the width equals the number of channels; a part of one channel stays whole."""
    net = Net(
        lambda s, x: s.c(torch.cat([s.p(s.a(x)), s.b(x)], 1)),
        a=nn.Conv2d(3, 7, 3, bias=False),
        b=nn.Conv2d(3, 1, 3, bias=False),
        p=nn.PReLU(7),
        c=nn.Conv2d(8, 4, 1),
    )
    nn.init.uniform_(net.p.weight, -1, 1)
    kill(net.a.weight, 2, 5)
    kill(net.b.weight, 0)
    folded, _ = fold(net, torch.randn(*IMAGE))
    assert shapes(folded)["a.weight"] == (5, 3, 3, 3)


def test_squeeze_keeps_a_dimension_that_was_cut_to_one() -> None:
    net = Net(
        lambda s, x: s.b(s.a(x).squeeze((1, 2)).flatten(1)), a=nn.Conv2d(3, 4, (3, 1), bias=False), b=nn.Linear(28, 2)
    )
    kill(net.a.weight, 0, 1, 3)
    folded, _ = fold(net, torch.randn(2, 3, 3, 7))
    assert shapes(folded)["a.weight"] == (1, 3, 3, 1)


def test_a_weight_that_depends_on_the_input_is_no_constant() -> None:
    """Half of a computed weight is known to be zero; the other half is not."""

    class Hyper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.tensor([[1.0], [0.0], [1.0], [0.0]]))
            self.out = nn.Linear(4, 3)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return self.out(F.linear(x, w * self.mask).relu())

    fold(Hyper(), torch.randn(2, 5), torch.randn(4, 5))


def test_layer_norm_width_is_refused() -> None:
    """The mean and variance are over all channels: a dead one still counts."""
    net = Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 8, bias=False), n=nn.LayerNorm(8), b=nn.Linear(8, 4))
    kill(net.a.weight, 3)
    folded, record = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (8, 6)
    assert [n.message for n in record.refusals] == [
        "1 of 8 dead outputs kept: held by layer_norm (aten.layer_norm.default)"
    ]


def test_outputs_of_the_model_are_kept() -> None:
    net = Net(lambda s, x: s.a(x), a=nn.Linear(6, 8))
    kill(net.a.weight, 3)
    folded, record = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (8, 6)
    assert "held by output" in record.refusals[0].message


def test_strict_refuses() -> None:
    net = Net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    kill(net.a.weight, 3)
    manager = PassManager(["evaluate-constants", "fold-channels{strict=true}"])
    program = capture(net, (torch.randn(3, 6),))
    assert manager.run(program) is program
    assert "NaN" in manager.records[-1].refusals[0].message


def test_tied_weight_is_cut_for_all_its_uses_at_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x).relu()).relu())

    model = Tied()
    kill(model.a.weight, 1)
    fold(model, torch.randn(3, 6))  # fold() proves that it is exact, whatever was cut


def test_resnet50_matches_the_narrow_network() -> None:
    """Half of the inner channels masked: parameters and operations within 2 % of building the narrow network directly."""

    class Narrow(models.resnet.Bottleneck):
        def __init__(self, inputs: int, width: int, stride: int):
            super().__init__(inputs, width, stride)
            half = width // 2
            self.conv1, self.bn1 = nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half)
            self.conv2, self.bn2 = nn.Conv2d(half, half, 3, stride, 1, bias=False), nn.BatchNorm2d(half)
            self.conv3 = nn.Conv2d(half, 4 * width, 1, bias=False)

    model, x = models.resnet50(), torch.randn(1, 3, 64, 64)
    for block in (m for m in model.modules() if isinstance(m, models.resnet.Bottleneck)):
        for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
            dead = torch.randperm(conv.out_channels)[: conv.out_channels // 2].tolist()
            kill(conv.weight, *dead)
            kill(norm.bias, *dead)
    folded, _ = fold(model, x)
    narrow = PassManager(pipelines.exact, "off").run(capture(models.ResNet(Narrow, [3, 4, 6, 3]).eval(), (x,)))
    assert abs(folded.parameter_count() / narrow.parameter_count() - 1) < 0.02
    assert abs(count_flops(folded) / count_flops(narrow) - 1) < 0.02


def test_coupling_graph_names_the_coupled_sets() -> None:
    import networkx as nx

    net = Net(
        lambda s, x: s.c(F.relu(s.a(x) + s.b(x))), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.Conv2d(8, 4, 1)
    )
    program = capture(net, (torch.randn(*IMAGE),))
    graph = ChannelAnalysis.of(program).coupling()
    coupled = next(c for c in nx.connected_components(graph) if ("add", 1) in c)
    assert {("conv2d", 1), ("conv2d_1", 1), ("relu", 1), ("a_weight", 0), ("b_weight", 0), ("c_weight", 1)} <= coupled


# ---------------------------------------------------------------------- random graphs


STEPS = ["conv", "group", "depth", "norm", "act", "residual", "concat", "gate", "pool", "shuffle"]


@st.composite
def random_nets(draw: st.DrawFn) -> tuple[nn.Module, int]:
    """A random image network (convolutions, groups, norms, gates, residuals, concatenations, pools) with random dead rows."""
    seed = draw(st.integers(0, 10_000))
    steps = draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=7))
    amount = draw(st.sampled_from([0.0, 0.3, 0.6, 0.9]))
    return RandomNet(steps, seed, amount), seed


class RandomNet(nn.Module):
    """Executes a list of steps; each parametrised step has its own layer."""

    def __init__(self, steps: list[str], seed: int, amount: float):
        super().__init__()
        torch.manual_seed(seed)
        self.steps, channels, layers = steps, 8, [nn.Conv2d(3, 8, 3, padding=1)]
        for step in steps:
            if step in ("conv", "residual", "concat"):
                layers.append(nn.Conv2d(channels, channels, 3, padding=1))
            elif step == "group":
                layers.append(nn.Conv2d(channels, channels, 3, groups=4))
            elif step == "depth":
                layers.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
            elif step == "norm":
                layers.append(nn.BatchNorm2d(channels))
                layers[-1].running_mean.normal_()
            elif step == "gate":
                layers.append(nn.Conv2d(channels, channels, 1))
            else:
                layers.append(nn.Identity())
            channels = channels * 2 if step == "concat" else channels
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(channels, 3)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    dead = torch.rand(module.out_channels, generator=generator) < amount
                    module.weight[dead] = 0
                    module.bias[dead & (torch.rand(module.out_channels, generator=generator) < 0.5)] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for step, layer in zip(self.steps, list(self.layers)[1:]):
            if step == "residual":
                x = x + F.relu(layer(x))
            elif step == "concat":
                x = torch.cat([x, layer(x)], 1)
            elif step == "gate":
                x = x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
            elif step == "act":
                x = F.hardswish(x)
            elif step == "pool":
                x = F.avg_pool2d(x, 3, 1, 1)
            elif step == "shuffle":
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            else:
                x = layer(x)
        return self.head(x.mean((2, 3)))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(random_nets())
def test_random_networks_fold_exactly(made: tuple[nn.Module, int]) -> None:
    """Equal in float64, and folding again cuts nothing."""
    model, seed = made
    folded, _ = fold(model, torch.randn(1, 3, 17, 17, generator=torch.Generator().manual_seed(seed)))
    analysis = ChannelAnalysis.of(folded)
    assert analysis.cuts == []


BEFORE = """\
program model {
  %x = input : f32[2, 3]
  %first = constant "first" : f32[4, 3]
  %second = constant "second" : f32[2, 4]
  %a = aten.linear.default(%x, %first, None) : f32[2, 4]
  %b = aten.relu.default(%a) : f32[2, 4]
  %y = aten.linear.default(%b, %second, None) : f32[2, 2]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 3]
  %first = constant "first" : f32[3, 3]
  %second = constant "second" : f32[2, 3]
  %a = aten.linear.default(%x, %first, None) : f32[2, 3]
  %b = aten.relu.default(%a) : f32[2, 3]
  %y = aten.linear.default(%b, %second, None) : f32[2, 2]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite(
        "fold-channels{round_to=1}",
        BEFORE,
        AFTER,
        constants={"first": torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None].repeat(1, 3)},
    )


def dead_output() -> tuple:
    net = Net(lambda s, x: s.a(x), a=nn.Linear(6, 8))
    kill(net.a.weight, 3)
    return net, torch.randn(3, 6)


def sorted_outputs() -> tuple:
    """A dead value that an operator without a rule holds."""
    net = Net(lambda s, x: s.b(s.a(x).sort(-1).values), a=nn.Linear(6, 8, bias=False), b=nn.Linear(8, 4))
    kill(net.a.weight, 3)
    return net, torch.randn(3, 6)


def dead_branch() -> tuple:
    """Nobody reads what a branch adds to a concatenation, and one of its channels stays: a dimension does not vanish."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.c(torch.cat([y, y, s.b(y)], 1).mean((2, 3)))

    net = Net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 1), c=nn.Linear(10, 3))
    kill(net.c.weight, 8, 9, dim=1)
    return net, torch.randn(1, 3, 5, 5)


REFUSALS = [
    ("strict: an input may be NaN or infinite, and 0 * NaN is not 0", dead_output),
    ("* of * dead outputs kept: held by *", sorted_outputs),
    ("another use of the value", dead_branch),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    item = "fold-channels{strict=true}" if sentence.startswith("strict") else "fold-channels{min_improvement=inf}"
    check_refusal(item, sentence, build, partly=build is dead_branch)
