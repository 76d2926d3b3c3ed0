"""Code for GPUs, made where there is none: it is translated to machine code and read; what it computes is checked by running the same
module on the CPU, before it is scheduled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from tvm.runtime.vm import VirtualMachine

import thresher
from helpers.cuda import MMA, bodies, compiled_code, half
from helpers.nvrtc import kernels
from thresher import Tune, capture
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.kernels.cuda.schedules import MULTIPROCESSORS, TILES, tiles
from thresher.backends.tvm.plans import runner
from thresher.backends.tvm.runtime import weight_array
from thresher.backends.tvm.target import resolve_target
from thresher.errors import BackendError
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.testing import ZOO, settle
from thresher.tuning.records import Records
from thresher.verification.compare import compare


class Products(nn.Module):
    """Small and large, deep and shallow: linear layers, a 3x3 and a 1x1 convolution, and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.wide = nn.Conv2d(3, 48, 3, stride=2, padding=1), nn.Conv2d(48, 96, 1)
        self.qkv, self.head = nn.Linear(96, 288), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(self.stem(x).relu()).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 24)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(y.mean(1)).softmax(-1)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_90", torch.float16), ("sm_80", torch.bfloat16)])
def test_half_precision_products_use_tensor_cores(arch: str, dtype: torch.dtype) -> None:
    model, args = half(Products(), (torch.randn(2, 3, 32, 32),), dtype)
    source = compiled_code(model, args, arch)
    products = {n: b for n, b in bodies(source).items() if "conv2d" in n or "matmul" in n}
    assert len(products) >= 4 and "mma.sync.aligned" in source and "flash_attention" in source
    on_cores = [n for n, b in products.items() if MMA in b]
    assert len(on_cores) >= 4, f"without tensor cores: {sorted(set(products) - set(on_cores))}"
    assert all("wmma::accumulator, 16, 16, 16, float" in products[n] for n in on_cores), "sums in float32"
    for kernel in kernels(source, arch):
        assert kernel.threads <= 1024 and kernel.registers * kernel.threads <= 65536, kernel
        assert kernel.shared <= 48 << 10 and kernel.spilled <= 64, kernel


def test_single_precision_is_single_precision() -> None:
    """No rounding of float32 operands behind the user's back."""
    source = compiled_code(Products(), (torch.randn(2, 3, 32, 32),))
    assert MMA not in source and "half" not in "".join(bodies(source).values())
    assert all(k.spilled == 0 and k.registers * k.threads <= 65536 for k in kernels(source, "sm_90"))


def test_small_windows_have_a_thread_per_result() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(), nn.AvgPool2d(2))
    found = bodies(compiled_code(model, (torch.randn(2, 64, 28, 28),)))
    windows = [b for n, b in found.items() if "conv2d" in n or "pool" in n]
    assert windows and not any("__syncthreads" in b or "__shfl" in b for b in windows)


def test_weights_are_not_transposed_at_run_time() -> None:
    model = nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 72))
    assert not any("transpose" in n for n in bodies(compiled_code(model, (torch.randn(32, 96),))))


def test_static_launches_become_a_graph() -> None:
    model, args = ZOO["vit"]()
    compiled = thresher.compile(model.eval(), args, target="cuda:sm_90", verify="off")
    assert "cuda_graph.run_or_capture" in compiled.executable.code.as_text()


@pytest.mark.parametrize(
    ("name", "dtype"),  # a kernel of every kind; the rest of the zoo has no others
    [*((n, torch.float16) for n in ("llama", "mobilenet", "unet", "vit")), ("vit", torch.bfloat16)],
)
def test_models_are_translated(name: str, dtype: torch.dtype) -> None:
    """In half precision, for a GPU; no kernel asks for more than a multiprocessor has."""
    model, args = half(*ZOO[name](), dtype)
    found = kernels(compiled_code(settle(model), args, "sm_80"), "sm_80")
    assert found and all(k.registers * k.threads <= 65536 and k.shared <= 48 << 10 for k in found)


@pytest.mark.parametrize("name", ["bert_masked", "lista", "llama", "mobilenet", "unet", "vit"])
def test_the_module_before_scheduling_is_right(name: str) -> None:
    """What the GPU's schedules start from, run by TVM on the CPU, against eager."""
    model, args = ZOO[name]()
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(capture(settle(model), args)).rounded()
    imported = import_program(program, resolve_target("cuda:sm_75"))
    executable = tvm.compile(imported.module, tvm.target.Target({"kind": "llvm"}))
    main = VirtualMachine(executable, tvm.cpu())["main"]
    inputs = [tvm.runtime.tensor(np.ascontiguousarray(a.numpy())) for a in args if isinstance(a, Tensor)]
    found = [torch.from_dlpack(y) for y in main(*inputs, weight_array(imported.weights, tvm.cpu()))]
    with torch.no_grad():
        expected = [y for y in torch.utils._pytree.tree_leaves(model(*args)) if isinstance(y, Tensor)]
    assert compare(expected, found).relative < 1e-5


@given(st.integers(1, 64), st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_the_tiles_are_ours(batch: int, m: int, n: int, k: int) -> None:
    assert sorted(map(repr, tiles(batch, m, n, k))) == sorted(map(repr, TILES))


def test_large_problems_have_large_tiles() -> None:
    assert tiles(1, 8192, 8192, 8192)[0] == TILES[0]
    small = tiles(1, 128, 256, 512)[0]
    assert -(-128 // small.rows) * -(-256 // small.columns) > 8
    assert tiles(1, 8192, 8192, 27)[0].depth == 32, "a slice of 64 would be more than half zeros"
    assert MULTIPROCESSORS >= 100


class Clock(runner.Runner):
    """There is no GPU here: the fewer threads a block has, the faster the kernel is said to be."""

    def __init__(self, kind: str):
        assert kind == "cuda"

    def prepare(self, executable: Any) -> int:
        source = executable.mod.imports[0].imports[0].inspect_source()
        return max(int(n) for n in re.findall(r"__launch_bounds__\((\d+)\)", source))

    def load(self, threads: int, weights: list, inputs: list[np.ndarray], footprint: int) -> Callable[[int], float]:
        assert [x.dtype for x in inputs] == [np.float16] * len(inputs)
        return lambda times: 1e-6 * threads


def test_tiles_are_measured_recorded_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Runner", Clock)
    model, args = half(nn.Sequential(nn.Linear(256, 2048), nn.GELU()), (torch.randn(4096, 256),))

    def threads(tune: Any) -> set[str]:
        compiled = thresher.compile(model, args, target="cuda:sm_90", verify="off", tune=tune)
        assert compiled.report.tuned[1] == 1
        return set(re.findall(r"__launch_bounds__\((\d+)\)", compiled.executable.device_code()))

    assert "512" in threads("never")
    assert threads(Tune()) == threads("recorded") == {"128"}
    (record,) = [r for r in Records().all() if r.workload.startswith("tensor cores")]
    assert "Tile(warps=(2, 2)" in record.plan or "Tile(warps=(1, 4)" in record.plan


def test_tuning_for_a_gpu_needs_one() -> None:
    model, args = half(nn.Linear(64, 64), (torch.randn(64, 64),))
    with pytest.raises(BackendError, match="none is here"):
        thresher.compile(model, args, target="cuda:sm_90", verify="off", tune=Tune())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ZOO))
def test_half_precision_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    model, args = half(*ZOO[name](), dtype)
    model, args = settle(model).cuda(), tuple(a.cuda() for a in args)
    assert all(c.passed for c in thresher.compile(model, args).report.checks)


@pytest.mark.gpu
def test_tiles_are_measured_on_a_gpu() -> None:
    model, args = half(nn.Sequential(nn.Linear(256, 2048), nn.GELU()).cuda(), (torch.randn(512, 256).cuda(),))
    compiled = thresher.compile(model, args, tune=Tune(trials=4))
    assert compiled.report.tuned[1] == 1 and all(c.passed for c in compiled.report.checks)
