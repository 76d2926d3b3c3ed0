"""Norms whose width shrinks: the statistics keep counting the channels that are gone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import thresher
from helpers.folds import Net, fold, kill, shapes
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

DEAD = (0, 3, 4, 7)


def settle_norm(norm: nn.Module, dead: tuple[int, ...] = DEAD) -> nn.Module:
    """Random affine parameters, zero at ``dead``."""
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5)
    kill(norm.weight, *dead)
    return norm


@pytest.mark.parametrize("offset", [0.0, 0.7])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_width_of_a_row_norm(kind: type, offset: float) -> None:
    """``offset``: the dead channels are constants other than 0."""
    net = Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 9), n=settle_norm(kind(9)), b=nn.Linear(9, 4))
    kill(net.a.weight, *DEAD)
    with torch.no_grad():
        net.a.bias[list(DEAD)] = offset * torch.arange(1.0, 5.0)
    folded, record = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (5, 6)
    assert shapes(folded)["b.weight"] == (4, 5)
    assert record.refusals == []


def test_a_row_norm_whose_output_nobody_reads() -> None:
    net = Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 9), n=nn.LayerNorm(9), b=nn.Linear(9, 4))
    kill(net.a.weight, *DEAD)
    kill(net.b.weight, *DEAD, dim=1)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (5, 6)
    assert shapes(folded)["n.weight"] == (5,)


def test_a_row_norm_without_parameters() -> None:
    net = Net(
        lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 9), n=nn.RMSNorm(9, elementwise_affine=False), b=nn.Linear(9, 4)
    )
    kill(net.a.weight, *DEAD)
    kill(net.a.bias, *DEAD)
    kill(net.b.weight, *DEAD, dim=1)
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (5, 6)


@pytest.mark.parametrize("dead", [(0, 3, 4, 7), (0, 1, 2), (0, 1, 2, 5)])
def test_channels_of_a_group_norm(dead: tuple[int, ...]) -> None:
    """Parts of groups, a whole group, and both."""
    net = Net(
        lambda s, x: s.b(s.n(s.a(x)).relu()),
        a=nn.Conv2d(3, 9, 3),
        n=settle_norm(nn.GroupNorm(3, 9), dead),
        b=nn.Conv2d(9, 4, 1),
    )
    kill(net.a.weight, *dead)
    folded, _ = fold(net, torch.randn(2, 3, 9, 9))
    assert shapes(folded)["a.weight"][0] == 9 - len(dead)
    assert shapes(folded)["b.weight"][1] == 9 - len(dead)


def test_a_bias_map_before_a_group_norm_stays() -> None:
    """A channel that differs at the border is no single number: it stays, and the result is right."""
    net = Net(
        lambda s, x: s.c(s.n(s.b(s.a(x)))),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(4, 6, 3, padding=1),
        n=settle_norm(nn.GroupNorm(2, 6), (1,)),
        c=nn.Conv2d(6, 2, 1),
    )
    kill(net.a.weight, 0)
    with torch.no_grad():
        net.b.weight[1, 1:] = 0  # channel 1 sees only the constant channel, through the padding
    folded, _ = fold(net, torch.randn(1, 3, 9, 9))
    assert shapes(folded)["b.weight"][0] == 6


def test_instance_norm() -> None:
    net = Net(
        lambda s, x: s.b(s.n(s.a(x)).relu()),
        a=nn.Conv2d(3, 8, 3),
        n=nn.InstanceNorm2d(8, affine=True),
        b=nn.Conv2d(8, 4, 1),
    )
    kill(net.a.weight, 1, 6)
    folded, _ = fold(net, torch.randn(2, 3, 9, 9))
    assert shapes(folded)["a.weight"] == (6, 3, 3, 3)


@pytest.mark.parametrize("image", [True, False])
def test_the_norms_compile(image: bool) -> None:
    """The operators that the fold leaves are lowered right, also with constants other than 0."""
    if image:
        net: nn.Module = Net(
            lambda s, x: s.b(s.n(s.a(x))), a=nn.Conv2d(3, 9, 3), n=settle_norm(nn.GroupNorm(3, 9)), b=nn.Conv2d(9, 4, 1)
        )
        x: Tensor = torch.randn(2, 3, 9, 9)
    else:
        net = Net(lambda s, x: s.b(s.n(s.a(x))), a=nn.Linear(6, 9), n=settle_norm(nn.LayerNorm(9)), b=nn.Linear(9, 4))
        x = torch.randn(3, 6)
    kill(net.a.weight, *DEAD)
    compiled = thresher.compile(net.eval(), (x,), target="cpu")
    assert "thresher." in compiled.text
    with torch.no_grad():
        assert not compare(tree_leaves(net(x)), tree_leaves(compiled(x))).exceeds(1e-5)


def test_norms_fold_again() -> None:
    """What has lost channels can lose more."""
    net = Net(
        lambda s, x: s.b(s.n(s.a(x))), a=nn.Conv2d(3, 9, 3), n=settle_norm(nn.GroupNorm(3, 9)), b=nn.Conv2d(9, 4, 1)
    )
    kill(net.a.weight, *DEAD)
    folded, _ = fold(net, torch.randn(2, 3, 9, 9))
    again = folded.clone()
    for name in ("a.weight", "n.weight"):
        again.constants[name] = again.constants[name].clone()
        kill(again.constants[name], 1)
    twice = PassManager(pipelines.exact, "each").run(again)
    assert shapes(twice)["a.weight"][0] == 4
    before, after = (p.run(*p.probe, dtype=torch.float64) for p in (again, twice))
    assert not compare(before, after).exceeds(1e-9)
