"""What LLVM makes of the CPU kernels, read: the properties on which their speed hangs, and which no test of results would miss."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import thresher


def source(model: nn.Module, x: torch.Tensor, kind: str) -> str:
    """The LLVM IR (``ll``) or the assembly (``s``) of a model's kernels."""
    compiled = thresher.compile(model.eval(), (x,), target="cpu", validate="off", verify="off", strict_rounding=True)

    def llvm(module: Any) -> Any:
        return next((i for i in module.imports if i.kind == "llvm"), None) or llvm(module.imports[0])

    return str(llvm(compiled.lowered.executable.mod).inspect_source(kind))


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
    hottest = max(re.split(r"\n\.L\w+:", code), key=lambda block: len(re.findall(r"\bvfmadd|\bfmla", block)))
    assert len(re.findall(r"\bvfmadd|\bfmla", hottest)) >= 32
    assert not re.findall(r"\bmovslq|\bvpextr|\bcltq|\bsxtw", hottest)
