"""unfold(): the original's state_dict back, before and after training the small module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import thresher
from thresher.errors import ProgramError
from thresher.ir.lineage import TrainedApart, moved, unfold
from thresher.testing import ZOO, mask_channels, settle
from thresher.verification.compare import compare


def masked(name: str) -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    return mask_channels(settle(model), 0.3), args


@pytest.mark.parametrize("name", sorted(ZOO))
def test_fold_train_unfold(name: str) -> None:
    """Unfolded untrained it is the original bit for bit; trained, the original with the unfolded state computes what the small one does."""
    model, args = masked(name)
    small = thresher.rewrite(model, args)
    state = small.unfold()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        before = [t.clone() for t in tree_leaves(small(*args))]
    sum(o.square().mean() for o in tree_leaves(small(*args))).backward()
    torch.optim.SGD(small.parameters(), lr=1e-3).step()
    large, _ = masked(name)
    large.load_state_dict(small.unfold())
    with torch.no_grad():
        trained, back = tree_leaves(small(*args)), tree_leaves(large(*args))
    assert compare(before, trained).relative > 1e-5, "training changed nothing"
    assert not compare(trained, back).exceeds(1e-5)


def test_what_has_no_way_back_is_named() -> None:
    """A layer without a bias has no place for what training put there."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(x)))

    model, x = Net(), torch.randn(3, 6)
    with torch.no_grad():
        model.a.weight[2] = 0
    small = thresher.rewrite(model, (x,))
    new = [name for name, p in small.named_parameters() if p.shape == (4,)]
    assert len(new) == 1
    with torch.no_grad():
        small.get_parameter(new[0]).add_(1.0)
    with pytest.raises(ProgramError, match=new[0]):
        small.unfold()


def test_a_copy_knows_the_way_back() -> None:
    model, args = masked("resnet18")
    small = thresher.rewrite(model, args)
    with torch.no_grad():
        next(small.parameters()).mul_(1.5)
    twin = copy.deepcopy(small)
    assert all(torch.equal(a, b) for a, b in zip(small.unfold().values(), twin.unfold().values()))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert bool(next(small.parameters()).any())


W = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
MOVES = {"whole": lambda t: t, "rows": lambda t: t[:2]}


@pytest.mark.parametrize("move", MOVES)
def test_copies_that_were_trained_apart_are_named(move: str) -> None:
    """A parameter that one call reads as it is, and another one from a copy: tied weights, where a pass moved one of them."""
    lineage = [moved("copy", "weight", W, MOVES[move])]
    initial = {"weight": W, "copy": MOVES[move](W)}
    for name in initial:
        with pytest.raises(TrainedApart, match=r"copies of weight were trained apart \(one of them in copy\)"):
            unfold({"weight": W}, lineage, initial, {**initial, name: initial[name] * 1.01})
    both = {name: value * 1.01 for name, value in initial.items()}
    assert torch.equal(unfold({"weight": W}, lineage, initial, initial)["weight"], W)
    assert torch.equal(unfold({"weight": W}, lineage, initial, both)["weight"], W * 1.01)


def test_parts_of_a_parameter_may_be_trained_apart() -> None:
    lineage = [moved("upper", "weight", W, lambda t: t[:1]), moved("lower", "weight", W, lambda t: t[1:])]
    trained = {"upper": W[:1] * 2, "lower": W[1:] * 3}
    back = unfold({"weight": W}, lineage, {"upper": W[:1], "lower": W[1:]}, trained)
    assert torch.equal(back["weight"], torch.cat([W[:1] * 2, W[1:] * 3]))


def test_two_copies_of_a_parameter_that_is_gone() -> None:
    lineage = [moved("a", "weight", W, lambda t: t.mT), moved("b", "weight", W, lambda t: t[:2])]
    initial = {"a": W.mT.contiguous(), "b": W[:2]}
    with pytest.raises(TrainedApart, match="copies of weight"):
        unfold({"weight": W}, lineage, initial, {**initial, "a": initial["a"] * 1.5})


def test_tied_weights_of_a_real_module_are_not_lost_silently() -> None:
    """A batch norm is folded into one of two layers that share their weight."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.norm(self.a(x))))

    small = thresher.rewrite(settle(Tied()), (torch.randn(5, 4),))
    assert len([p for p in small.parameters() if p.dim() == 2]) == 2
    small.unfold()
    with torch.no_grad():
        next(p for p in small.parameters() if p.dim() == 2).mul_(1.1)
    with pytest.raises(TrainedApart, match="freeze them before training"):
        small.unfold()


class Shared(nn.Module):
    """A weight that is read as it is, and in a value that is the same for every input: the passes compute that beforehand."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.query, self.head = folded, nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            return self.head(x * self.norm.weight.tanh() + self.norm.weight)
        normed = self.norm(torch.cat([self.query.expand(len(x), -1, -1), x], 1))
        return self.head(normed[:, :1].sigmoid() * normed[:, 1:])


@pytest.mark.parametrize(("folded", "new"), [(False, "tanh"), (True, "sigmoid_known")])
def test_what_was_computed_of_a_parameter_is_not_trained_apart_from_it(folded: bool, new: str) -> None:
    model, x = Shared(folded), torch.randn(2, 5, 4)
    small = thresher.rewrite(model, (x,), passes=["exact"])
    names = {name.rpartition(".")[2]: parameter for name, parameter in small.named_parameters()}
    with torch.no_grad():
        small.get_parameter("head.weight").mul_(1.1)
        model.load_state_dict(small.unfold())
        torch.testing.assert_close(model(x), small(x))
        small.get_parameter("norm.weight").mul_(1.1)
    with pytest.raises(TrainedApart, match=rf"copies of norm.weight were trained apart \(one of them in {new}"):
        small.unfold()
    with torch.no_grad():
        small.get_parameter("norm.weight").copy_(model.norm.weight)
        names[new].mul_(1.1)
    with pytest.raises(ProgramError, match=f"nothing in the original model corresponds to them: {new}"):
        small.unfold()


class Twice(nn.Module):
    """Two values that no input changes: one leads back to ``weight``, the other was computed from it, or from what scales it."""

    def __init__(self, product: bool) -> None:
        super().__init__()
        self.product, self.weight, self.scale = product, nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("mask", torch.tensor([1.0, 2.0, 1.0, 3.0]))
        self.register_buffer("order", torch.tensor([3, 1, 2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        if self.product:
            return x * (self.weight * self.scale) + self.scale
        return x * (self.weight * self.mask) + self.weight[self.order]


@pytest.mark.parametrize(("product", "trained", "name"), [(False, "mul", "weight"), (True, "scale", "scale")])
def test_a_source_that_comes_back_must_be_what_it_was(product: bool, trained: str, name: str) -> None:
    model, x = Twice(product), torch.randn(2, 4)
    small = thresher.rewrite(model, (x,), passes=["exact"])
    constants = {n.rpartition(".")[2]: p for n, p in small.named_parameters()}
    assert all(torch.equal(v, small.unfold()[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        constants[trained].mul_(1.1)
    with pytest.raises(TrainedApart, match=f"copies of {name} were trained apart"):
        small.unfold()
