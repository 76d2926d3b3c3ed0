"""What the code for GPUs computes, where there is none: every generated kernel is compiled for the CPU, its threads as fibers and its
matrix instructions emulated, and run beside the same kernel before it was scheduled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.cuda import MMA, half
from thresher import capture
from thresher.backends.tvm.codegen.relax_pipeline import fuse, schedule
from thresher.backends.tvm.emulation.kernels import check_kernels, compare_kernel, functions
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.kernels.cuda.schedules import TILES
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.target import resolve_target
from thresher.errors import BackendError
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager

TARGET = resolve_target("cuda:sm_80")


class Mixed(nn.Module):
    """A kernel of every kind: convolutions (dense, depthwise), pools, products with epilogues, norms, softmax, reductions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.deep = nn.Conv2d(3, 20, 3, stride=2, padding=1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.pool, self.wide = nn.AvgPool2d(2), nn.Conv2d(20, 36, 1)
        self.norm, self.up, self.down = nn.LayerNorm(36), nn.Linear(36, 70), nn.Linear(70, 36)
        self.head = nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.pool(self.deep(self.stem(x).relu()).relu())).flatten(2).transpose(1, 2)
        y = y + self.down(nn.functional.gelu(self.up(self.norm(y))))
        y = (y @ y.transpose(1, 2)).softmax(-1) @ y
        return self.head(y.mean(1)).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_kernel_computes_what_it_did_before_it_was_scheduled(dtype: torch.dtype) -> None:
    model, args = half(Mixed().eval(), (torch.randn(2, 3, 16, 16),), dtype)
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(capture(model, args))
    code = check_kernels(program)
    assert len(code) >= 12
    assert sum(MMA in text for text in code.values()) == (5 if dtype is torch.float16 else 0)


def test_a_kernel_that_computes_something_else_is_named(tmp_path: Path) -> None:
    modules = [import_program(capture(m, (torch.randn(2, 8),)), TARGET).module for m in (nn.ReLU(), nn.Hardsigmoid())]
    (before,) = functions(fuse(modules[0], TARGET)).values()
    (after,) = functions(schedule(modules[1], TARGET, PlanSelector())).values()
    with pytest.raises(AssertionError, match="kernel relu: what it computes on a GPU is off by"):
        compare_kernel("relu", before, after, tmp_path, TARGET)


def test_only_code_for_gpus_is_emulated() -> None:
    with pytest.raises(BackendError, match="check_kernels: 'cpu' is no GPU; write cuda:sm_NN"):
        check_kernels(capture(nn.ReLU(), (torch.randn(2, 8),)), "cpu")


@pytest.mark.parametrize("tile", [*TILES[:5], TILES[6]], ids=str)  # every shape, both depths
def test_every_tile_is_right(tile: object, tmp_path: Path) -> None:
    """Three slices deep, and no size a multiple of the tile's."""
    model, args = half(nn.Sequential(nn.Linear(150, 70), nn.ReLU()).eval(), (torch.randn(40, 150),))
    program = PassManager(pipelines.specialize, "off").run(capture(model, args)).rounded()
    module = import_program(program, TARGET).module
    asked = PlanSelector()
    schedule(module, TARGET, asked)
    ((workload, _),) = asked.sites.items()
    after = schedule(module, TARGET, PlanSelector({workload: repr(tile)}))
    (name,) = [n for n in functions(after) if "matmul" in n]
    code = compare_kernel(name, functions(fuse(module, TARGET))[name], functions(after)[name], tmp_path, TARGET)
    assert f"__launch_bounds__({32 * tile.warps[0] * tile.warps[1]})" in code and MMA in code


@pytest.mark.parametrize("masked", [False, True])
def test_selected_blocks_are_right(masked: bool, tmp_path: Path) -> None:
    """In groups, some forced, of masked keys; the lists become those of a pyramid."""

    class Select(nn.Module):
        def forward(self, q: Tensor, k: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            forced = torch.zeros(1, 4, 2, 6, dtype=torch.bool)
            forced[..., 0] = True
            keep, mass, groups = (
                torch.tensor([2, 3, 6, 6]),
                torch.tensor([2.0, 2.0, 0.7, 2.0]),
                torch.tensor([3, 2, 3, 1]),
            )
            given = keys if masked else None
            how = (given, forced, keep, mass, 64, 16, 0.5, 6, not masked, groups, 2)
            lists = torch.ops.thresher.select_blocks(q, k, *how)
            return torch.ops.thresher.pyramid_lists(*lists, torch.tensor([True, False, True, True]), 2, 12)

    model, args = half(Select(), (torch.randn(1, 4, 100, 8), torch.randn(1, 2, 90, 8)))
    program = PassManager([*pipelines.exact], "off").run(capture(model, (*args, torch.rand(1, 1, 1, 90) > 0.3)))
    module = import_program(program, TARGET).module
    before, after = functions(fuse(module, TARGET)), functions(schedule(module, TARGET, PlanSelector()))
    assert {"rank", "before", "pyramid_entries"} <= {n.rstrip("0123456789") for n in after}
    for name, function in before.items():
        (tmp_path / name).mkdir()
        compare_kernel(name, function, after[name], tmp_path / name, TARGET)
