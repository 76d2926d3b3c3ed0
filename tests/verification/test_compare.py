"""Comparison: what counts as equal, and what never does."""

from __future__ import annotations

import pytest
import torch

import thresher
import thresher.ops
from helpers.modules import Function
from thresher.frontend.capture import capture
from thresher.verification.compare import compare, resized_inputs
from thresher.verification.rounding import find_undecided_choice

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.1], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, NAN], [1.0, INF], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-3], False),
        ([1e9, 1.0], [1e9, 1.0 + 1e-3], True),
        ([1.0], [1.0, 1.0], False),
    ],
)
def test_compare(a: list, b: list, equal: bool) -> None:
    assert compare([torch.tensor(a)], [torch.tensor(b)]).exceeds(1e-6) is not equal


def test_compare_literals_and_counts() -> None:
    assert not compare([3, None], [3, None]).exceeds(0)
    assert compare([3], [4]).exceeds(1e9)
    assert compare([torch.ones(1)], []).exceeds(1e9)
    assert compare([torch.ones(1)], [1.0]).exceeds(1e9)


def test_the_worst_output_is_reported() -> None:
    found = compare([torch.ones(2), torch.ones(2)], [torch.ones(2), torch.tensor([1.0, 1.5])])
    assert found.output == 1 and found.relative == 0.5


class Tie(torch.nn.Module):
    """The rows with the largest sums."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x.sum(-1).topk(3, -1).indices
        return x.gather(1, first.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def test_what_rounding_decides_is_compared_on_another_input() -> None:
    """Rows of the same numbers in other orders have the same sum, up to rounding: which are first is anybody's guess."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(301, generator=generator)
    tie = torch.stack([row[torch.randperm(301, generator=generator)] for _ in range(40)])[None]
    clear = torch.randn(1, 40, 301, generator=generator)
    program = capture(Tie(), (tie,))
    choice = find_undecided_choice(program, [tie])
    assert choice is not None and choice.target is torch.ops.aten.topk.default
    assert find_undecided_choice(program, [clear]) is None
    checks = thresher.compile(Tie(), (tie,)).report.checks
    assert all(c.passed for c in checks) and len({c.name.partition(",")[0] for c in checks}) == 3


def test_what_is_continuous_is_not_decided_by_rounding() -> None:
    """A soft threshold whose zeros come and go with rounding moves by no more than that: no excuse for another input."""
    x = torch.full((1000,), 0.4) + 1e-7 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    soft, hard = (capture(Shrunk(kind), (x,)) for kind in ("soft", "hard"))
    assert find_undecided_choice(soft, [x]) is None and find_undecided_choice(hard, [x]) is not None


class Shrunk(torch.nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.thresher.shrink(x, torch.tensor(0.4), self.kind)


def test_sizes_on_which_attention_reads_past_the_end_are_left_out() -> None:
    """Keys and values of two lengths, free both: torch's fused kernels do not look."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    free = (None, {2: torch.export.Dim("keys")}, {2: torch.export.Dim("values")})
    args = (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4))
    program = capture(Function(call), args, dynamic_shapes=(free,))
    resized = resized_inputs(program, program.probe)
    assert resized is not None and resized[1].shape[2] == resized[2].shape[2] != 5


def test_a_program_that_looks_at_bits_is_compared_in_its_own_dtypes() -> None:
    x = torch.randn(3, 4)
    model = Function(lambda x: (x * 2).view(torch.int32))
    compiled = thresher.compile(model, (x,))
    assert torch.equal(compiled(x), model(x))
