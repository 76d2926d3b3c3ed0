"""Which nodes a kernel computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.modules import Function
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.ir.nodes import is_tensor


def test_equal_values_that_are_fused_in_another_order() -> None:
    """Two slices are one computation; the one that is read last is bound first."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        sums = x.cumsum(-1)
        first, second = sums[..., -1:], sums[..., -1]
        late = F.pad(second, (1, 0))[..., None].cumsum(1)
        return (first - late[:, -1:]).exp(), late

    program = capture(Function(function), (torch.randn(2, 8, 16),)).rounded()
    executable = TVMBackend().lower(program, "cpu")
    named = {node for _, nodes in executable.kernels for node in nodes}
    assert named >= {"cumsum", "sub", "exp", "cumsum_1"}
    assert named <= {n.name for n in program.calls() if is_tensor(n)}
    assert all(nodes for _, nodes in executable.kernels)
