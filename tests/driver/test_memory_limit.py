"""A build that would need more memory than there is says so, before it takes it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.analysis.cost.peak_memory import peak_of
from thresher.driver import memory_limit
from thresher.driver.memory_limit import GIGABYTE, VARIABLE, available_bytes, check_memory
from thresher.errors import InputError, MemoryLimitError
from thresher.frontend.capture import capture


class Pairs(nn.Module):
    """Every pair of rows is multiplied: n * n * width numbers, of which one sum is left."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] * x[None]).sum(-1)


def test_the_value_is_named_and_the_cures(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.004")
    with pytest.raises(MemoryLimitError) as caught:
        thresher.compile(Pairs(), (torch.randn(64, 128),))
    message = str(caught.value)
    assert "building Pairs needs about 0.00" in message and "0.004 GB are available" in message
    assert "for mul (aten.mul.Tensor, module mul)" in message and "test_memory_limit.py" in message
    assert 'verify="off", without which' in message and VARIABLE in message
    assert isinstance(caught.value, MemoryError)


def test_without_the_check_in_float64_it_takes_half(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.004")
    x = torch.randn(64, 128)
    compiled = thresher.compile(Pairs(), (x,), verify="off")
    torch.testing.assert_close(compiled(x), Pairs()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [thresher.rewrite, lambda *a: thresher.lower(*a, to="captured")])
def test_every_way_to_build_asks(build, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.001")
    with pytest.raises(MemoryLimitError, match="needs about"):
        build(Pairs(), (torch.randn(64, 128),))


def test_weights_count() -> None:
    program = capture(nn.Linear(512, 512), (torch.randn(1, 512),))
    check_memory(program, "off", available=2 * 512 * 512 * 4)
    with pytest.raises(MemoryLimitError, match=r"for (_)?weight \(weight"):
        check_memory(program, "final", available=2 * 512 * 512 * 4)


def test_what_is_available(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(memory_limit, "CONTROL_GROUP", tmp_path)
    here = available_bytes()
    assert here is None or here > 0
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4000000\n")
    (tmp_path / "memory.stat").write_text("anon 3000000\ninactive_file 500000\n")
    assert available_bytes() == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() != 1_500_000
    (tmp_path / "limits").write_text("Max address space         6000000              unlimited            bytes\n")
    (tmp_path / "statm").write_text("1000 10 10")
    monkeypatch.setattr(memory_limit, "PROCESS", tmp_path)
    assert available_bytes() == 6_000_000 - 1000 * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "limits").write_text("Max address space         unlimited            unlimited            bytes\n")
    assert available_bytes() != 6_000_000 - 1000 * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv(VARIABLE, "2.5")
    assert available_bytes() == 2.5 * GIGABYTE
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(InputError, match="must be a number of gigabytes, not 'much'"):
        available_bytes()


MEASURED = """
import resource, sys, torch, thresher

class Pairs(torch.nn.Module):
    def forward(self, x):
        return (x[:, None] * x[None]).sum(-1)

build = thresher.rewrite if sys.argv[1] == "rewrite" else thresher.capture
build(Pairs(), (torch.randn(256, 512),))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def test_the_estimate_bounds_what_is_taken() -> None:
    """The peak of a process that rewrites a model, over that of one that only captures it, is that of the float64 run."""

    def taken(what: str) -> int:
        run = subprocess.run([sys.executable, "-c", MEASURED, what], capture_output=True, text=True, check=True)
        return int(run.stdout)

    wide = peak_of(capture(Pairs(), (torch.randn(256, 512),)), wide=True).bytes
    assert taken("rewrite") - taken("capture") < 1.5 * wide
