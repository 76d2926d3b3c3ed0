"""What LLVM makes of the CPU kernels, read: the properties on which their speed hangs, and which no test of results would miss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thresher
from thresher.errors import BackendError

FUSED = r"\bvfmadd\w*|\bfmla\b"


def source(model: nn.Module, x: torch.Tensor, kind: str, target: str = "cpu") -> str:
    """The LLVM IR (``ll``) or the assembly (``s``) of a model's kernels."""
    compiled = thresher.compile(model.eval(), (x,), target=target, validate="off", verify="off", strict_rounding=True)

    def llvm(module: Any) -> Any:
        return next((i for i in module.imports if i.kind == "llvm"), None) or llvm(module.imports[0])

    return str(llvm(compiled.executable.code.mod).inspect_source(kind))


@pytest.mark.parametrize("channels", [5, 29])
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU()],
    ids=lambda a: type(a).__name__,
)
def test_no_element_decides_where_to_go(activation: nn.Module, channels: int) -> None:
    """No branch on a floating-point comparison, also where a row is no multiple of a register: half of them would be mispredicted."""
    code = source(nn.Sequential(nn.Conv2d(8, channels, 1), activation), torch.randn(1, 8, 12, 12), "ll")
    functions = code.split("\ndefine ")
    compared = [set(re.findall(r"(%[\w.]+) = fcmp", f)) for f in functions]
    assert any(compared)
    assert not any(c & set(re.findall(r"br i1 (%[\w.]+)", f)) for c, f in zip(compared, functions))


@pytest.mark.parametrize("channels", [96, 67, 20])
@pytest.mark.parametrize("grouped", [False, True], ids=["product", "depthwise"])
def test_sums_are_in_registers(channels: int, grouped: bool) -> None:
    """A tile's sums are on the stack, not in a buffer of the runtime's, which LLVM has to read and write each time; only the image that a
    depthwise convolution stages is in one."""
    layer = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels) if grouped else nn.Conv2d(16, channels, 1)
    code = source(nn.Sequential(layer, nn.ReLU()), torch.randn(1, layer.in_channels, 14, 14), "ll")
    product = next(f for f in code.split("\ndefine ") if "parallel_lambda" in f and re.search(r"fmul|fmuladd", f))
    assert product.count("@__TVMBackendAllocWorkspace") == int(grouped)


@pytest.mark.parametrize("stride", [1, 2])
def test_addresses_are_not_computed_in_the_innermost_loop(stride: int) -> None:
    """A 3x3 convolution whose tiles of rows lie across the lines of the image reads each row through a pointer."""
    code = source(nn.Conv2d(48, 144, 3, stride, 1), torch.randn(1, 48, 28 * stride, 28 * stride), "s")
    hottest = max(re.split(r"\n\.L\w+:", code), key=lambda block: len(re.findall(FUSED, block)))
    assert len(re.findall(FUSED, hottest)) >= 32
    assert not re.findall(r"\bmovslq|\bvpextr|\bcltq|\bsxtw", hottest)


@pytest.mark.parametrize("cpu", ["neoverse-n1", "x86-64-v3", "x86-64-v4"])
def test_other_cpus_use_their_vectors(cpu: str) -> None:
    """The innermost loop multiplies and adds in the registers of the processor it is for, and leaves none of them."""
    code = source(nn.Conv2d(48, 96, 3, 1, 1), torch.randn(1, 48, 28, 28), "s", f"cpu:{cpu}")
    blocks = re.split(r"\n\.L\w+:|\n\s+(?:j\w+|b\.\w+)\s", code)  # between labels and jumps
    hottest = max(blocks, key=lambda block: len(re.findall(FUSED, block)))
    register = {"neoverse-n1": r"v\d+\.4s", "x86-64-v3": r"%ymm", "x86-64-v4": r"%zmm"}[cpu]
    assert len(re.findall(rf"(?:{FUSED}).*{register}", hottest)) >= 24
    stored = [
        line for line in hottest.splitlines() if re.search(rf"\b(?:st[rp]\s+q|vmov[au]ps\s+{register}\d+, )", line)
    ]
    assert not stored


def test_unknown_cpus_are_named() -> None:
    with pytest.raises(BackendError, match="unknown CPU in target 'cpu:frobnicator'"):
        source(nn.Conv2d(8, 8, 1), torch.randn(1, 8, 4, 4), "s", "cpu:frobnicator")


def test_saving_for_another_architecture_names_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = thresher.compile(nn.Conv2d(8, 8, 1).eval(), (torch.randn(1, 8, 4, 4),), target="cpu:neoverse-n1")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(BackendError, match=r"needs the compiler aarch64-linux-gnu-g\+\+"):
        compiled.save(tmp_path / "model.thresher")
    assert not list(tmp_path.iterdir())
