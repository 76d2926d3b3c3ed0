"""What the code for GPUs computes, where there is none: every generated kernel is compiled for the CPU, its threads as fibers and its
matrix instructions emulated, and run beside the same kernel before it was scheduled."""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm import tirx

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.cuda import EMULATION, MMA, half
from thresher import capture
from thresher.backends.tvm.codegen.relax_pipeline import context_of, fuse, schedule
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.kernels.cuda.schedules import TILES
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.target import resolve_target
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager

TARGET = resolve_target("cuda:sm_80")
ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{')
DYNAMIC = re.compile(r"extern __shared__ (__align__\(\d+\)) uchar (\w+)\[\]")
BINDING = re.compile(r'^( *)for .*T\.thread_binding\((?:T\.int64\()?(\d+)\)?, thread="([\w.]+)"')


FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC"]


@functools.cache
def headers() -> Path:
    """The emulation's headers, compiled once: they take three times as long as a kernel."""
    folder = tempfile.TemporaryDirectory(prefix="emulation-")
    atexit.register(folder.cleanup)
    shutil.copytree(EMULATION, folder.name, dirs_exist_ok=True)
    header = Path(folder.name) / "emulation.h"
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return Path(folder.name)


def launches(function: tirx.PrimFunc) -> list[dict[str, int]]:
    """The extents of blocks and threads, of each kernel that the function becomes: one for every outermost loop."""
    loops = [match for line in function.script().splitlines() if (match := BINDING.match(line))]
    outermost = min(len(match[1]) for match in loops)
    found: list[dict[str, int]] = []
    for indent, extent, axis in (match.groups() for match in loops):
        if len(indent) == outermost:
            found.append({})
        found[-1][axis] = max(int(extent), found[-1].get(axis, 1))
    return found


def emulate(function: tirx.PrimFunc, folder: Path, values: dict[str, np.ndarray]) -> str:
    """Run a scheduled function on ``values`` by the names of its buffers; returns its code."""
    with TARGET.tvm, context_of(TARGET):
        code = (
            tvm.compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), TARGET.tvm)
            .mod.imports[0]
            .inspect_source()
        )
    text = DYNAMIC.sub(r"\1 static uchar \2[1 << 18]", code)
    text = '#include "emulation.h"\n' + text.replace("__shared__ alignas", "static __align__")
    kernels: dict[str, list[str]] = {}  # their pointers by name
    for (name, parameters), extents in zip(ENTRY.findall(code), launches(function), strict=True):
        kinds, kernels[name] = re.findall(r"(\w+\*)", parameters), re.findall(r"(\w+?)_ptr(?:_\d+)?\b", parameters)
        casts = ", ".join(f"({kind})pointers[{i}]" for i, kind in enumerate(kinds))
        grid, block = (", ".join(str(extents.get(f"{of}Idx.{x}", 1)) for x in "xyz") for of in ("block", "thread"))
        text += f'extern "C" bool run_{name}(void** pointers) {{\n'
        text += f"  return emulated::launch({{{grid}}}, {{{block}}}, [=] {{ {name}({casts}); }});\n}}\n"
    (folder / "kernel.cpp").write_text(text)
    command = ["g++", *FLAGS, "-shared", f"-I{headers()}", "-o", folder / "kernel.so", folder / "kernel.cpp"]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    between: dict[str, np.ndarray] = {}  # what one kernel leaves for the next
    for name, names in kernels.items():
        arrays = [values[n] if n in values else between.setdefault(n, np.zeros(1 << 20, np.uint8)) for n in names]
        run = library[f"run_{name}"]
        run.restype = ctypes.c_bool
        assert run((ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])), f"{name}: threads wait for ever"
    return code


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


def functions(module: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    return {g.name_hint: f for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}


def examples(function: tirx.PrimFunc) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {p.name: ([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in function.params}
    return {name: random.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


def compared(before: tirx.PrimFunc, after: tirx.PrimFunc, folder: Path) -> str:
    """Run both; returns the code of the scheduled one."""
    values = examples(before)
    given = {name: tvm.runtime.tensor(v) for name, v in values.items()}
    wanted = [given[p.name] for p in before.params]  # one may be there twice
    host = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    tvm.compile(tvm.IRModule({"main": before.with_attr("global_symbol", "main")}), host)["main"](*wanted)
    code = emulate(after, folder, values)
    have, want = list(values.values())[-1].astype(float), wanted[-1].numpy().astype(float)
    unit = 2.0**-10 if values[before.params[-1].name].dtype == np.float16 else 1e-6
    assert np.abs(have - want).max() <= 4 * unit * max(1.0, np.abs(want).max())
    return code


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_every_kernel_computes_what_it_did_before_it_was_scheduled(dtype: torch.dtype, tmp_path: Path) -> None:
    model, args = half(Mixed().eval(), (torch.randn(2, 3, 16, 16),), dtype)
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(capture(model, args)).rounded()
    module = import_program(program, TARGET).module
    before, after = fuse(module, TARGET), schedule(module, TARGET, PlanSelector())
    scheduled, on_cores = functions(after), 0
    assert len(scheduled) >= 12
    for name, function in functions(before).items():
        if name != "flash_attention":  # it has tests of its own
            (tmp_path / name).mkdir()
            on_cores += MMA in compared(function, scheduled[name], tmp_path / name)
    assert on_cores == (5 if dtype is torch.float16 else 0)


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
    code = compared(functions(fuse(module, TARGET))[name], functions(after)[name], tmp_path)
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
        compared(function, after[name], tmp_path / name)
