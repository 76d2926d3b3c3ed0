"""The GPU's attention kernel: its very text, run on the CPU with emulated instructions, against attention in float32; and what becomes of
it for a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import thresher
from helpers.cuda import bodies, compiled_code
from helpers.nvrtc import kernels
from thresher.backends.tvm.emulation.kernels import HEADERS
from thresher.backends.tvm.kernels.cuda.flash_attention import Operand, Problem, source
from thresher.ops.sparse_attention import block_lists

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """q [1, heads, rows, e], k [1, heads / group, keys, e], v [.., f]; ``mask``: its shape and whether it is boolean."""

    rows: int
    keys: int
    e: int
    f: int
    dtype: str = "float16"
    heads: int = 2
    group: int = 1
    causal: bool = False
    mask: tuple[tuple[int, int, int, int], bool] | None = None
    heads_inside: bool = False
    lists: tuple[int, int, int] | None = None  # lists of how many heads, blocks of how many queries and keys
    softcap: float | None = None
    skip: float | None = None

    def problem(self) -> Problem:
        around = self.heads // self.group
        q, k, v = (
            Operand.of(shape, self.heads_inside)
            for shape in (
                (1, self.heads, self.rows, self.e),
                (1, around, self.keys, self.e),
                (1, around, self.keys, self.f),
            )
        )
        mask = Operand.mask(self.mask[0]) if self.mask else None
        kind = "NONE" if self.mask is None else "BOOLEAN" if self.mask[1] else "ADDED"
        lists, (_, block_q, block_k) = self.block_lists(), self.lists or (1, 64, 64 if self.e <= 64 else 32)
        shape = None if lists is None else tuple(lists[0].shape)
        return Problem(
            q, k, v, mask, kind, self.causal, 0.3, self.dtype, self.softcap, shape, block_q, block_k,
            self.skip,
        )  # fmt: skip

    def grid(self) -> Tensor | None:
        """Which blocks of keys each block of queries looks at; one looks at none."""
        if self.lists is None:
            return None
        heads, block_q, block_k = self.lists
        shape = (1, heads, -(-self.rows // block_q), -(-self.keys // block_k))
        found = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.6
        found[0, 0, 0] = False
        return found

    def block_lists(self) -> tuple[Tensor, Tensor] | None:
        grid = self.grid()
        return None if grid is None else block_lists(grid)


CASES = [
    Case(64, 64, 64, 64),
    Case(70, 130, 64, 64, "bfloat16"),  # several tiles of keys, the last of them short
    Case(5, 9, 24, 40),
    Case(3, 17, 7, 5),  # no row starts at 16 bytes
    Case(80, 80, 32, 32, causal=True),
    Case(20, 70, 128, 128, "bfloat16", causal=True),
    Case(40, 40, 16, 16, heads=4, group=2, heads_inside=True),
    Case(33, 70, 16, 24, mask=((1, 1, 33, 70), True)),
    Case(33, 70, 16, 24, "bfloat16", mask=((1, 2, 1, 70), False)),
    Case(150, 200, 32, 32, lists=(2, 64, 64)),
    Case(150, 200, 32, 24, "bfloat16", lists=(1, 128, 16), softcap=2.0),
    Case(130, 130, 16, 16, lists=(2, 64, 32), causal=True),
    Case(70, 70, 128, 128, lists=(1, 64, 64)),  # tiles of half a block
    Case(70, 300, 64, 64, skip=3.0),
    Case(150, 200, 128, 128, "bfloat16", skip=4.0, causal=True),
    Case(130, 200, 32, 16, lists=(2, 64, 64), skip=2.0, mask=((1, 2, 1, 200), False)),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """A library with a function ``run<i>(q, k, v, mask, blocks, counts, out)`` for every case."""
    folder = tmp_path_factory.mktemp("emulated")
    text = '#include "emulation.h"\n' + source()
    for i, case in enumerate(CASES):
        problem = case.problem()
        bits, cell = "const unsigned short*", "unsigned char" if problem.mask_kind == "BOOLEAN" else "float"
        numbers = ", ".join(f"{x}f" if isinstance(x, float) else str(x) for x in problem.arguments)
        across, down = problem.grid
        text += (
            f'extern "C" void run{i}({bits} q, {bits} k, {bits} v, const {cell}* mask, const int* blocks, const int* counts, '
            f"unsigned short* out) {{\n"
            f"  emulated::launch({{{across}, {down}, 1}}, {{128, 1, 1}},\n"
            f"                   [=] {{ {problem.function}(q, k, v, mask, blocks, counts, out, {numbers}); }});\n}}\n"
        )
    (folder / "kernel.cpp").write_text(text)
    made = folder / "kernel.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", f"-I{HEADERS}"]
    subprocess.run(["g++", *flags, "-o", made, folder / "kernel.cpp"], check=True)
    return ctypes.CDLL(str(made))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_kernel_computes_attention(emulated: ctypes.CDLL, number: int) -> None:
    case, dtype = CASES[number], TYPES[CASES[number].dtype]
    problem = case.problem()
    generator = torch.Generator().manual_seed(number)
    q, k, v = (torch.randn(o.shape, generator=generator) for o in (problem.q, problem.k, problem.v))
    if case.skip:  # the later keys matter less and less
        q, k = q + 1, (k + 1) * torch.linspace(1, 0.2, case.keys).unsqueeze(1)
    q, k, v = (t.to(dtype) for t in (q, k, v))
    mask = None
    if case.mask:
        mask = torch.randn(case.mask[0], generator=generator)
        mask = mask > -0.5 if case.mask[1] else mask
        if case.mask[1]:
            mask[..., 3, :] = False  # nothing left
    stored = [t.transpose(1, 2).contiguous() if case.heads_inside else t for t in (q, k, v)]
    out = torch.full((1, case.heads, case.rows, case.f), float("nan"), dtype=dtype)
    lists = [t.contiguous() for t in case.block_lists() or (out, out)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*stored, mask if mask is not None else stored[0], *lists, out)]
    getattr(emulated, f"run{number}")(*pointers)
    k, v = (t.repeat_interleave(case.group, 1) for t in (k, v))
    added = None if mask is None else mask if case.mask and case.mask[1] else mask.double()
    q, k, v = (t.double() for t in (q, k, v))
    if case.lists or case.softcap or case.skip:
        how = (problem.block_q, problem.block_k, 0.3, case.causal, case.softcap, case.skip)
        given = (q, k, v, added, *(case.block_lists() or (None, None)))
        wanted = torch.ops.thresher.sparse_attention(*given, *how)
        if case.skip:
            assert (wanted - torch.ops.thresher.sparse_attention(*given, *how[:-1])).abs().max() > 1e-3, (
                "nothing is left out"
            )
    else:
        wanted = scaled_dot_product_attention(q, k, v, added, is_causal=case.causal, scale=0.3)
    if case.mask and case.mask[1]:
        assert (out[:, :, 3] == 0).all()
        wanted[:, :, 3] = 0
    unit = 2.0**-11 if dtype is torch.float16 else 2.0**-8  # one rounding of the weights and one of the result
    assert (out.double() - wanted).abs().max() <= 2 * unit * v.double().abs().max()


class Attention(nn.Module):
    def __init__(self, heads: int, size: int, causal: bool = False):
        super().__init__()
        self.heads, self.size, self.causal = heads, size, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (24, torch.float16)])
def test_attention_is_one_kernel_without_scores_in_memory(size: int, dtype: torch.dtype) -> None:
    args = tuple(torch.randn(2, 197, 4 * size, dtype=dtype) for _ in range(3))
    code = compiled_code(Attention(4, size), args, "sm_80")
    found = bodies(code)
    assert [n for n in found if "attention" in n] and not any("softmax" in n or "matmul" in n for n in found)
    assert len(found) <= 2, "the heads are read where they lie: no transposition but that of the result"
    for kernel in kernels(code, "sm_80"):
        assert kernel.shared <= 48 << 10 and kernel.spilled <= 64 and kernel.registers * kernel.threads <= 65536, kernel


def test_attention_over_lists_is_one_kernel() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks, counts = block_lists(torch.eye(4, dtype=torch.bool)[None, None])
            self.register_buffer("blocks", blocks)
            self.register_buffer("counts", counts)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.ops.thresher.sparse_attention(q, k, v, None, self.blocks, self.counts, 64, 64, 0.2)

    args = tuple(torch.randn(2, 4, 197, 32, dtype=torch.float16) for _ in range(3))
    found = bodies(compiled_code(Listed(), args, "sm_90"))
    assert len(found) == 1 and "attention" in next(iter(found))


def test_before_these_instructions_attention_is_composed() -> None:
    args = tuple(torch.randn(2, 64, 64, dtype=torch.float16) for _ in range(3))
    assert "flash_attention" not in compiled_code(Attention(2, 32), args, "sm_75")
    assert "flash_attention" in compiled_code(Attention(2, 32), args, "sm_80")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (24, torch.float16)])
def test_on_a_gpu(size: int, dtype: torch.dtype, causal: bool) -> None:
    args = tuple(torch.randn(2, 197, 4 * size, dtype=dtype, device="cuda") for _ in range(3))
    model = Attention(4, size, causal)
    compiled = thresher.compile(model, args)
    assert "flash_attention" in compiled.executable.device_code()
    wanted = model(*(a.double() for a in args))
    unit = 2.0**-11 if dtype is torch.float16 else 2.0**-8
    assert (compiled(*args).double() - wanted).abs().max() <= 2 * unit * args[2].double().abs().max()
