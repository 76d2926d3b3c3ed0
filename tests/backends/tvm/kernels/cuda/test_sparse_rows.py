"""A few rows on a GPU, without the inputs that are 0: the kernel's very text, run on the CPU with emulated instructions, and what becomes
of it for a GPU."""

from __future__ import annotations

import ctypes
import math
import subprocess

import pytest
import torch
from torch import Tensor, nn

import thresher
import thresher.ops  # noqa: F401  (registers the operators)
from helpers.cuda import bodies, compiled_code
from helpers.nvrtc import kernels
from thresher.analysis.cost.break_even import BreakEven
from thresher.backends.tvm.emulation.kernels import HEADERS
from thresher.backends.tvm.kernels.cuda.sparse_rows import MAX_SLICE, MIN_SLICE, Problem, fits, source
from thresher.frontend.capture import capture
from thresher.passes.sparsity.skip_zeros import SkipZeros
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager

C_TYPES = {"float32": "float", "float16": "half"}
CASES = [
    Problem(1, 300, 64, "float32"), Problem(3, 100, 520, "float32"), Problem(8, 130, 16, "float32"), Problem(1, 700, 1032, "float16"),
    Problem(5, 33, 8, "float16"),
]  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library with a function ``run<i>(x, weight, parts)`` for every case."""
    folder = tmp_path_factory.mktemp("emulated")
    text = '#include "emulation.h"\n#include "cuda_fp16.h"\n' + source()
    for i, p in enumerate(CASES):
        kind = C_TYPES[p.dtype]
        text += (
            f'extern "C" void run{i}(const {kind}* x, const {kind}* w, float* parts) {{\n'
            f"  emulated::launch({{{p.across}, {p.slices}, 1}}, {{128, 1, 1}}, [=] {{ {p.function}(x, w, parts); }});\n}}\n"
        )
    (folder / "kernel.cpp").write_text(text)
    made = folder / "kernel.so"
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{HEADERS}"]
    subprocess.run(["g++", *flags, "-o", made, folder / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(made))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_kernel_adds_what_is_not_zero(emulated: ctypes.CDLL, number: int) -> None:
    """Weights that meet zeros may be no numbers."""
    p, dtype = CASES[number], getattr(torch, CASES[number].dtype)
    generator = torch.Generator().manual_seed(number)
    x, weight = (
        torch.randn(p.m, p.k, generator=generator).to(dtype),
        torch.randn(p.k, p.n, generator=generator).to(dtype),
    )
    x *= torch.rand(p.m, p.k, generator=generator) < 0.4
    x[:, 5:20] = 0
    wanted = x.double() @ weight.double()
    weight[5:20] = math.nan
    parts = torch.full((p.slices, p.m, p.n), math.nan)
    getattr(emulated, f"run{number}")(*(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, parts)))
    assert (parts.sum(0).double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    x[0, 7] = math.nan  # and counts
    getattr(emulated, f"run{number}")(*(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, parts)))
    assert parts.sum(0)[0].isnan().all()


def test_slices_fill_a_gpu() -> None:
    for p in (Problem(1, 4096, 1024, "float16"), Problem(1, 1024, 4096, "float32"), Problem(8, 128, 128, "float32")):
        assert MIN_SLICE <= p.slice <= MAX_SLICE and p.slices * p.slice >= p.k > (p.slices - 1) * p.slice
    assert Problem(1, 4096, 1024, "float16").slices >= 100
    assert (
        fits(8, 64, "float16")
        and not fits(9, 64, "float16")
        and not fits(1, 12, "float16")
        and not fits(1, 8, "float64")
    )


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) - 0.5).relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_it_is_translated(dtype: torch.dtype) -> None:
    class Sparse(FFN):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.thresher.sparse_linear((self.up(x) - 0.5).relu(), self.down.weight, self.down.bias)

    code = compiled_code(Sparse().to(dtype), (torch.randn(2, 64).to(dtype),), "sm_80")
    assert any("sparse_rows" in name for name in bodies(code))
    for kernel in kernels(code, "sm_80"):
        assert kernel.shared <= 48 << 10 and kernel.spilled == 0, kernel


def test_zeros_are_skipped_on_gpus_too() -> None:
    model, x = FFN().half().eval(), torch.randn(2, 64).half()
    manager = PassManager([SkipZeros()])
    free = lambda layer: BreakEven(1.0, (0.01, 1.0), (0.01, 1.0))  # noqa: E731
    manager.run(capture(model, (x,)), Context("cuda:sm_80", find_break_even=free))
    assert len(manager.records[0].rewrites) == 1
