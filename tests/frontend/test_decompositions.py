"""Operators that are kept whole stay so, unless they write what their schema does not say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import thresher
from helpers.modules import Function
from thresher.errors import CaptureError
from thresher.frontend.capture import capture


class InstanceNorm(nn.Module):
    """Instance norm whose running statistics are inputs."""

    def __init__(self, use_input_stats: bool):
        super().__init__()
        self.use_input_stats = use_input_stats

    def forward(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> Tensor:
        return F.instance_norm(x, mean, var, weight, None, self.use_input_stats, 0.3)


@pytest.mark.parametrize(("use_input_stats", "written"), [(True, (1, 2)), (False, ())])
def test_running_statistics_of_an_instance_norm(use_input_stats: bool, written: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 3, 5, generator=generator), *(torch.rand(3, generator=generator) + 0.5 for _ in range(3)))
    model = InstanceNorm(use_input_stats)
    assert capture(model, inputs).writes == written
    ours, eagers = ([t.clone() for t in inputs] for _ in range(2))
    torch.testing.assert_close(thresher.compile(model, inputs)(*ours), model(*eagers))
    torch.testing.assert_close(ours, eagers)


def test_an_instance_norm_that_writes_nothing_is_whole() -> None:
    program = capture(nn.InstanceNorm1d(3), (torch.ones(2, 3, 5),))
    assert torch.ops.aten.instance_norm.default in {node.target for node in program.calls()}


CHECKED = {
    "cholesky": torch.linalg.cholesky,
    "inv": torch.linalg.inv,
    "inverse of a power": lambda x: torch.linalg.matrix_power(x, -2),
    "solve": lambda x: torch.linalg.solve(x, x + 1),
    "tensorsolve": lambda x: torch.linalg.tensorsolve(x.reshape(2, 2, 4), x.reshape(2, 2, 4)[..., 0]),
    "tensorinv": lambda x: torch.linalg.tensorinv(x.reshape(2, 2, 4)),
    "lu_factor": torch.linalg.lu_factor,
    "ldl_factor": torch.linalg.ldl_factor,
}


@pytest.mark.parametrize("name", CHECKED)
def test_linear_algebra_that_raises_for_some_matrices_is_whole(name: str) -> None:
    """Torch spells it out as a computation and a check that is a side effect."""
    program = capture(Function(CHECKED[name]).eval(), (torch.eye(4) + 0.1,))
    torch.testing.assert_close(
        tuple(program.run(torch.eye(4) + 0.1)), tuple(tree_leaves(CHECKED[name](torch.eye(4) + 0.1)))
    )


@pytest.mark.parametrize(
    ("read", "shape"),
    [
        (lambda x: x.transpose(0, 1).as_strided((3, 2), (2, 1)), (4, 5)),
        (lambda x: x.permute(2, 0, 1).as_strided((3, 2), (2, 1), 3), (2, 3, 5)),
        (lambda x: x.view(16, 1, 8, 2).permute(3, 1, 2, 0).as_strided((2, 3, 4), (1, 16, 2)), (16, 16)),
        (lambda x: x[1:].as_strided((3, 2), (2, 1), 5), (4, 5)),
        (lambda x: x[1:].as_strided((3, 2), (2, 1)), (4, 5)),
        (lambda x: x[1:].transpose(0, 1).as_strided((3, 2), (2, 1), 6), (4, 5)),
    ],
)
def test_reads_by_strides_of_what_is_permuted_or_a_part(
    read: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    """Compiled code has no strides and no memory before a value's own: Longformer's overlapping chunks of transposed heads."""
    x = torch.randn(shape)
    torch.testing.assert_close(thresher.compile(Function(lambda x: read(x * 2)), (x,))(x), read(x * 2))


def test_reads_before_the_start_are_refused() -> None:
    with pytest.raises(CaptureError, match="as_strided reads memory before the start of its argument"):
        capture(Function(lambda x: (x * 2)[1:].t().as_strided((3, 2), (2, 1), 0)), (torch.randn(4, 5),))
