"""A build writes nothing to the terminal, whether it succeeds or fails: TVM's C++ code would warn on standard error."""

from __future__ import annotations

import subprocess
import sys

BUILDS = """
import torch
import thresher
from thresher.errors import BackendError

class Everyday(torch.nn.Module):  # a table lookup, large exponents, a resize by tables
    def forward(self, x, i):
        y = torch.nn.functional.interpolate(x, size=(7, 5))
        return torch.index_select(y, 1, i) ** 3 + y.clamp_min(0) ** 4.5

class WithoutLowering(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x.relu())

x = torch.randn(1, 2, 4, 4)
thresher.compile(Everyday(), (x, torch.tensor([1, 0])), target="cpu")  # checked against eager
try:
    thresher.compile(WithoutLowering(), (x,), target="cpu", library="never")
except BackendError as error:
    print(error)
"""


def test_builds_write_nothing_to_standard_error() -> None:
    run = subprocess.run([sys.executable, "-c", BUILDS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "aten._linalg_svd.default" in run.stdout and "library='auto'" in run.stdout
