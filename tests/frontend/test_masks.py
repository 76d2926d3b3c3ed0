"""Every way of naming dead weights folds to the same bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import thresher
from thresher.errors import InputError
from thresher.frontend.masks import apply_masks
from thresher.testing import settle


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


class Masked(nn.Module):
    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


DEAD = [1, 4, 5]
MASK = torch.ones(8).index_fill_(0, torch.tensor(DEAD), 0)


def made() -> Net:
    torch.manual_seed(0)
    return settle(Net())


def pruned() -> Net:
    model = made()
    prune.custom_from_mask(model.a, "weight", MASK.reshape(-1, 1, 1, 1).expand(8, 3, 3, 3))
    return model


def removed() -> Net:
    model = pruned()
    prune.remove(model.a, "weight")
    return model


def parametrized() -> Net:
    model = made()
    parametrize.register_parametrization(model.a, "weight", Masked(MASK.reshape(-1, 1, 1, 1)))
    return model


def zeroed() -> Net:
    model = made()
    with torch.no_grad():
        model.a.weight[DEAD] = 0
    return model


SPELLINGS: dict[str, Callable[[], Net]] = {
    "prune": pruned,
    "prune removed": removed,
    "parametrization": parametrized,
    "zeros": zeroed,
    "mask of rows": lambda: apply_masks(made(), {"a.weight": MASK}),
    "mask": lambda: apply_masks(made(), {"a.weight": MASK.reshape(-1, 1, 1, 1).expand(8, 3, 3, 3)}),
    "indices": lambda: apply_masks(made(), {"a": DEAD}),
}


def small(model: nn.Module) -> list[Tensor]:
    x = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return sorted((t for t in thresher.rewrite(model, (x,)).state_dict().values()), key=lambda t: tuple(t.shape))


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_all_spellings_fold_to_the_same_bytes(spelling: str) -> None:
    expected, found = small(zeroed()), small(SPELLINGS[spelling]())
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert expected[-1].shape[0] == 5 or any(t.shape[0] == 5 for t in expected)


def test_masks_in_the_call_leave_the_model_alone() -> None:
    model, x = made(), torch.randn(1, 3, 9, 9)
    before = copy.deepcopy(model.state_dict())
    module = thresher.rewrite(model, (x,), masks={"a": DEAD})
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert any(p.shape[:2] == (5, 3) for p in module.parameters())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x)).relu()
        return self.head(y + self.branch(y).relu())


def test_a_torch_pruning_history_takes_the_coupled_layers_along() -> None:
    """The history names one layer of the residual; what is left is what Torch-Pruning leaves: 8 - 2 - 1 channels everywhere."""
    torch.manual_seed(0)
    model, x = settle(Residual()), torch.randn(1, 3, 9, 9)
    history = [("stem", True, [1, 4]), ("branch", True, [0])]
    module = thresher.rewrite(model, (x,), masks=history)
    assert sorted(tuple(p.shape) for p in module.parameters() if p.dim() == 4) == [
        (4, 5, 1, 1),
        (5, 3, 3, 3),
        (5, 5, 3, 3),
    ]
    keep = [2, 3, 5, 6, 7]
    with torch.no_grad():
        y = model.norm(model.stem(x)).relu()[:, keep]
        z = nn.functional.conv2d(y, model.branch.weight[keep][:, keep], model.branch.bias[keep], padding=1).relu()
        expected = nn.functional.conv2d(y + z, model.head.weight[:, keep], model.head.bias)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"c": [1]}, "no module 'c'"),
        ({"a": [8]}, "has 8 outputs, there is no 8"),
        ({"a.weight": torch.ones(7)}, "shape (8, 3, 3, 3)"),
        ({"q.weight": torch.ones(7)}, "no parameter 'q.weight'"),
        ([("a", True)], "cannot read the history entry"),
        ([("nothing", True, [1])], "no module 'nothing'"),
    ],
)
def test_refusals(masks: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        apply_masks(made(), masks, (torch.randn(1, 3, 9, 9),))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_masks_need_a_module() -> None:
    with pytest.raises(InputError, match=r"nn\.Module"):
        thresher.rewrite("model.pt2", (), masks={"a": [1]})
