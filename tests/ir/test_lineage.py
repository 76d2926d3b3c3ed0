"""unfold(): the original's state_dict back, before and after training the small module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import thresher
from thresher.errors import ProgramError
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
