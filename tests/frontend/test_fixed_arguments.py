"""Arguments that are the same in every call are constants of the compiled model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.errors import CaptureError, InputError
from thresher.frontend.capture import capture
from thresher.frontend.fixed_arguments import fix_arguments

GRID = torch.tensor([[1, 2, 3]])


class Encoder(nn.Module):
    """As the vision parts of language models: the grid says how many patches there are, and how they are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, 5, 5))

    def forward(
        self, patches: Tensor, grid: Tensor, scale: float = 1.0, *, shift: Tensor | None = None, **others: Any
    ) -> Tensor:
        (_, height, width), *_ = grid.tolist()
        position = nn.functional.interpolate(self.position, (height, width))
        tokens = self.linear(patches) * scale + position.flatten(2)[0].T
        tokens = tokens if shift is None else tokens + shift
        return tokens * others.get("gain", 1.0)


@pytest.fixture
def model() -> nn.Module:
    return Encoder().eval()


@pytest.mark.parametrize(
    ("args", "kwargs", "fixed"),
    [
        (0, {}, {"grid": GRID}),
        (0, {"shift": torch.ones(4)}, {"grid": GRID, "scale": 3.0}),
        (1, {}, {"grid": GRID}),
        (0, {}, {"grid": GRID, "gain": torch.tensor(2.0)}),
    ],
)
def test_compiled_with_fixed_arguments(model: nn.Module, args: int, kwargs: dict, fixed: dict) -> None:
    """``args``: how many further positional arguments there are: they follow what is left."""
    patches = torch.randn(6, 4)
    others = (2.5,)[:args]
    compiled = thresher.compile(model, (patches, *others), kwargs, fixed=fixed)
    expected = model(patches, fixed["grid"], *others, **kwargs, **{k: v for k, v in fixed.items() if k != "grid"})
    torch.testing.assert_close(compiled(patches, *others, **kwargs), expected)


def test_names_and_memory_of_parameters_stay(model: nn.Module) -> None:
    bound = fix_arguments(model, {"grid": GRID})
    assert type(bound).__name__ == "Encoder" and type(model) is Encoder
    assert all(value is dict(model.named_parameters())[name] for name, value in bound.named_parameters())
    assert set(capture(bound, (torch.randn(6, 4),)).constants) <= {*dict(model.named_parameters())} | {"position_1"}


def test_a_deep_copy_runs_its_own_parameters(model: nn.Module) -> None:
    bound, patches = fix_arguments(model, {"grid": GRID}), torch.randn(6, 4)
    twin = copy.deepcopy(bound)
    with torch.no_grad():
        model.linear.weight.zero_()
    assert not torch.equal(twin(patches), bound(patches))


def test_a_forward_of_the_module_alone(model: nn.Module) -> None:
    patches, forward = torch.randn(6, 4), model.forward
    model.forward = lambda patches, grid: 10 * forward(patches, grid)
    assert torch.equal(fix_arguments(model, {"grid": GRID})(patches), model(patches, GRID))


def test_with_masks(model: nn.Module) -> None:
    patches = torch.randn(6, 4)
    compiled = thresher.compile(model, (patches,), fixed={"grid": GRID}, masks={"linear": [0, 2]})
    position = nn.functional.interpolate(model.position, (2, 3)).flatten(2)[0].T
    torch.testing.assert_close(compiled(patches)[:, [0, 2]], position[:, [0, 2]])
    assert model.linear.weight[0].abs().sum() > 0


def test_a_history_of_masks(model: nn.Module) -> None:
    history = [("linear", True, [1])]
    folded = thresher.rewrite(model, (torch.randn(6, 4),), fixed={"grid": GRID}, masks=history)
    assert folded(torch.randn(6, 4)).shape == (6, 4)


# ---------------------------------------------------------------------- refusals


def test_an_argument_that_forward_does_not_have() -> None:
    with pytest.raises(InputError, match="fixed: forward has no argument 'size'; it has input"):
        thresher.compile(nn.Linear(2, 2), (torch.randn(1, 2),), fixed={"size": 1})


def test_an_exported_program(model: nn.Module) -> None:
    exported = torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),))
    with pytest.raises(InputError, match="fixed= needs an nn"):
        thresher.compile(exported, fixed={"input": 1})


def test_the_error_of_a_size_from_an_input_names_the_cure(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"fixed=\{"):
        capture(model, (torch.randn(6, 4), GRID))
