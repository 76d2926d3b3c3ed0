"""Free sizes: plain ones, derived ones, arithmetic over them, and sizes that data decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim
from tvm import tirx

import thresher
from helpers.modules import Function
from thresher.backends.base import LoweringOptions
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.importing.sizes import Sizes, formula
from thresher.backends.tvm.target import resolve_target

N = Dim("n", min=2)
FUNCTIONS: dict[str, Callable] = {
    "reshape": lambda x: x.reshape(x.shape[0] // 2, 2, 6) + 1,
    "a number of it": lambda x: x * x.shape[0] ** -0.5,
    "compared with it": lambda x: torch.where(6 * x < x.shape[0], x, 0),
    "filled": lambda x: torch.cat([x, x.new_ones((x.shape[0] + 5) // 3, 6)]),
    "data decide": lambda x: x[x[:, 0] > 0] @ x.mT,
    "padded": lambda x: nn.functional.pad(x, (1, -x.shape[0] % 8, 2, 20 - x.shape[0]), value=-1.0),
    "by torch": lambda x: torch.cummax(x.reshape(x.shape[0] // 2, 12), 0)[0],
}


BY_TORCH = {"data decide": ["aten.index.Tensor"], "by torch": ["aten.cummax.default"]}
EVEN = {"reshape", "by torch"}  # an odd size cannot be halved


@pytest.mark.parametrize(
    ("name", "dim"),
    [(name, dim) for name in FUNCTIONS for dim in (N, 2 * N, 2 * N + 2) if dim is not N or name not in EVEN],
    ids=str,
)
def test_any_size(name: str, dim: Dim) -> None:
    function = FUNCTIONS[name]
    example = torch.randn(12, 6)
    compiled = thresher.compile(Function(function).eval(), (example,), target="cpu", dynamic_shapes=(({0: dim},),))
    for size in (6, 12, 26):
        x = torch.randn(size, 6)
        assert torch.allclose(compiled(x), function(x), atol=1e-4)
    assert [call.operator for call in compiled.report.library] == BY_TORCH.get(name, [])


NUMBERS: dict[str, Callable] = {
    "a size": lambda x: (x * 2, x.shape[0], 2 * x.shape[0] + 1),
    "a whole number": lambda x: (x > 0).sum().item(),
    "a number": lambda x: [x[1, 0].item(), x + x[0, 0].item()],
    "a truth value": lambda x: (x > 2).any().item(),
    "as a size": lambda x: torch.ones((x > 0).sum().item(), 2),
}


@pytest.mark.parametrize("backend", ["tvm", "eager"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_inputs_decide(name: str, backend: str, tmp_path) -> None:
    function, example = NUMBERS[name], torch.randn(5, 3)
    model = Function(function).eval()
    compiled = thresher.compile(model, (example,), target="cpu", backend=backend, dynamic_shapes=(({0: N},),))
    loaded = thresher.load(compiled.save(tmp_path / "m.thresher")) if backend == "tvm" else compiled
    for x in (example, torch.rand(7, 3) - 5, torch.rand(3, 3) + 5):
        for result in (compiled(x), loaded(x)):
            pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (result, function(x))), strict=True)
            assert all(type(a) is type(b) and torch.allclose(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def test_pieces_whose_sizes_data_decide() -> None:
    def function(x: torch.Tensor, at: torch.Tensor) -> tuple:
        return torch.tensor_split(x * 2, at)

    x = torch.randn(5, 3)
    compiled = thresher.compile(Function(function).eval(), (x, torch.tensor([1, 3])), target="cpu")
    for at in ([1, 3], [0, 5], [2, 2]):
        pairs = zip(compiled(x, torch.tensor(at)), function(x, torch.tensor(at)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_size_is_read_from_every_result_whose_data_decide_it() -> None:
    """Two results of one mask have one size, and TVM may compute either of them first."""

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple:
        mask = y > 0
        return x[mask] * 2, y[mask] + 1

    args = torch.randn(5, 3), torch.randn(5)
    program = thresher.capture(Function(function).eval(), args)
    text = import_program(program, resolve_target("cpu"), options=LoweringOptions(library=True)).module.script()
    assert text.count("R.match_cast") == 2


def test_a_lowering_whose_result_has_other_free_sizes_is_passed_over() -> None:
    """TVM's grid_sample takes its grid in another order, which numbers would show at once."""

    def function(image: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return nn.functional.grid_sample(image, grid, align_corners=True) * 2

    args = torch.randn(1, 3, 8, 8), torch.rand(1, 1, 5, 2) * 2 - 1
    shapes = (({}, {2: Dim("n", min=2)}),)
    compiled = thresher.compile(Function(function).eval(), args, target="cpu", dynamic_shapes=shapes)
    for size in (5, 3, 11):
        grid = torch.rand(1, 1, size, 2) * 2 - 1
        assert torch.allclose(compiled(args[0], grid), function(args[0], grid), atol=1e-5)


def test_sizes_that_differ_for_some_values_differ() -> None:
    shapes = (({0: N},),)
    (x,) = thresher.capture(Function(torch.sin).eval(), (torch.randn(4),), dynamic_shapes=shapes).placeholders
    sizes, n = Sizes(), x.meta["val"].shape[0]
    assert sizes.differ(4, n) is False  # nothing is known of it yet
    variable = sizes.define(formula(n))
    assert not sizes.differ(variable, n) and not sizes.differ((variable * 6) // 6, n)
    assert sizes.differ(variable * 2, n) and sizes.differ(5, n) and sizes.differ(variable, 5)
    assert not sizes.differ(variable * 1, n) and not sizes.differ(tirx.Var("m", "int64"), n)
