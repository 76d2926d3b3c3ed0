"""Free sizes stay free: through every pass of the pipelines, for every model of the zoo and all that may be free in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from helpers.modules import Function
from thresher.frontend.capture import capture
from thresher.ir.free_sizes import at_other_sizes, free_sizes
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.runtime.comparison import compare
from thresher.testing import ZOO, settle
from thresher.testing.zoo import mask_channels

TOKENS = ("bert", "bert_masked", "llama")
IMAGES = ("resnet18", "resnet50", "mobilenet", "unet")


def freed(name: str) -> dict[int, Any]:
    """The dimensions of an input of this model that may be free, for torch.export."""
    if name in TOKENS:
        return {0: Dim("batch", min=2), 1: Dim("length", min=2, max=30)}
    return {0: Dim("batch", min=2), **({2: Dim.AUTO, 3: Dim.AUTO} if name in IMAGES else {})}


def program_of(name: str) -> Program:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    args = tuple(torch.cat([a, a]) if len(a) == 1 else a for a in args)
    args = tuple(a[..., :48, :48] for a in args) if name in IMAGES else args
    return capture(mask_channels(settle(model), 0.5), args, dynamic_shapes=tuple(freed(name) for _ in args))


def folded(program: Program) -> tuple[PassManager, Program]:
    """The program after every pass, each of which must keep its sizes."""
    sizes, guards = free_sizes(program), len(program.fake_mode.shape_env.guards)
    manager = PassManager([*pipelines.resolve("exact"), *pipelines.specialize], "each")
    after = manager.run(program)
    assert free_sizes(after) == sizes and len(program.fake_mode.shape_env.guards) == guards
    assert not [(r.name, r.failure) for r in manager.records if r.status == "reverted"]
    return manager, after


SLOW = ("resnet50",)  # folds as resnet18 does


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in ZOO])
def test_every_pass_keeps_the_sizes_of_the_zoo(name: str) -> None:
    """And folds as it does for fixed sizes: half of all channels are masked."""
    program = program_of(name)
    assert free_sizes(program)
    manager, after = folded(program)
    assert "fold-channels" in {r.name for r in manager.records if r.status == "changed"}
    assert after.parameter_count() < 0.6 * program.parameter_count()
    others = [flat for flat in at_other_sizes(program, program.probe) if runs(program, flat)][:3]
    assert others
    for flat in others:
        expected, results = (p.run(*flat, dtype=torch.float64) for p in (program, after))
        assert not compare(expected, results).exceeds(1e-9)


def runs(program: Program, flat: tuple) -> bool:
    try:
        program.run(*flat)
    except Exception:  # whatever an operator of torch raises
        return False
    return True


class Border(nn.Module):
    """Padded convolutions after channels that are constant, and not zero."""

    def __init__(self, transposed: bool, groups: int):
        super().__init__()
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), kind(8, 4, 3, 2, 1, groups=groups)
        with torch.no_grad():
            self.first.weight[::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 3, 12])
def test_what_padding_lets_through_at_a_free_border(size: int, transposed: bool, groups: int) -> None:
    """An example that is all border says nothing of what is inside."""
    torch.manual_seed(0)
    model = settle(Border(transposed, groups))
    program = capture(model, (torch.randn(2, 3, size, size + 1),), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
    _, after = folded(program)
    assert (after.parameter_count() < program.parameter_count()) or groups > 1
    for shape in ((2, 3, 17, 9), (2, 3, 5, 31)):
        x = torch.randn(shape)
        expected, results = (p.run(x, dtype=torch.float64) for p in (program, after))
        assert not compare(expected, results).exceeds(1e-9)


def test_derived_sizes() -> None:
    """A size that is 2 s or s + 1 for another one."""
    s = Dim("s", min=2, max=40)

    def call(a: Tensor, b: Tensor, c: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
        return linear(torch.cat([a, a]) + b).relu(), c[1:] * a.sum(-1)

    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[::2] = 0
    args = (torch.randn(5, 8), torch.randn(10, 8), torch.randn(6))
    program = capture(Function(call, linear), args, dynamic_shapes=(({0: s}, {0: 2 * s}, {0: s + 1}),))
    (symbol, *_), (double, *_), (more, *_) = free_sizes(program).values()
    assert (double, more) == (f"2*{symbol}", f"{symbol} + 1")
    _, after = folded(program)
    flat = (torch.randn(9, 8), torch.randn(18, 8), torch.randn(10))
    assert not compare(program.run(*flat, dtype=torch.float64), after.run(*flat, dtype=torch.float64)).exceeds(1e-9)


def test_what_depends_on_a_free_size_is_no_constant() -> None:
    """A softmax over constants is one over their number, and their sum is a multiple of it."""

    def call(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        uniform = (x * 0).softmax(1)
        return uniform, (x * 0 + 1).sum(1), x[:, 4:].sum(1)

    program = capture(Function(call), (torch.randn(2, 7, 3),), dynamic_shapes=(({1: Dim("n", min=6, max=50)},),))
    _, after = folded(program)
    x = torch.randn(2, 11, 3)
    assert not compare(program.run(x, dtype=torch.float64), after.run(x, dtype=torch.float64)).exceeds(1e-9)
