"""Random inputs: they keep what the example shows, and differ from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.frontend.capture import capture
from thresher.verification.compare import compare_programs, observe
from thresher.verification.probes import probes, random_like

G = torch.Generator().manual_seed(0)
A = torch.randn(2, 4, 4, generator=G)
SPD = A @ A.mT + 0.1 * torch.eye(4)
NORMAL = 3 * torch.randn(5, 6, generator=G)


def is_definite(x: Tensor) -> bool:
    return torch.equal(x, x.mH) and bool((torch.linalg.eigvalsh(x) > 0).all())


def same_numbers(example: Tensor) -> Callable[[Tensor], bool]:
    return lambda x: torch.equal(x.flatten().sort().values, example.flatten().sort().values)


OFFSETS = torch.tensor([0, 3, 3, 7])
IDS = torch.tensor([[5, 1, 9, 1], [0, 4, 2, 3]])
ONE_HOT = F.one_hot(torch.tensor([3, 0, 2, 1, 1]), 4)
MASK = torch.full((4, 4), -torch.inf).triu(1) + torch.randn(4, 4, generator=G)

EXAMPLES: dict[str, tuple[Tensor, Callable[[Tensor], bool]]] = {
    "positive definite": (SPD, is_definite),
    "hermitian": ((A[0] + 1j * A[1]) + (A[0] + 1j * A[1]).mH, lambda x: torch.equal(x, x.mH)),
    "lower triangular": (A.tril(), lambda x: torch.equal(x, x.tril()) and bool((x.diagonal(0, 1, 2) != 0).all())),
    "upper triangular": (A.triu(), lambda x: torch.equal(x, x.triu())),
    "distribution": (A.softmax(-1), lambda x: torch.allclose(x.sum(-1), torch.ones(2, 4)) and bool((x >= 0).all())),
    "distribution along channels": (A.softmax(1), lambda x: torch.allclose(x.sum(1), torch.ones(2, 4))),
    "probabilities": (torch.rand(3, 5, generator=G), lambda x: bool(((x >= 0) & (x <= 1)).all())),
    "from -1 to 1": (torch.tanh(A), lambda x: bool((x.abs() <= 1).all())),
    "positive": (NORMAL.abs() + 0.1, lambda x: bool((x >= 0.1).all())),
    "negative": (-NORMAL.abs() - 2, lambda x: bool((x <= -2).all())),
    "rising": (NORMAL.sort(-1).values, lambda x: bool((x.diff(dim=-1) >= 0).all())),
    "falling": (NORMAL.sort(-1, descending=True).values, lambda x: bool((x.diff(dim=-1) <= 0).all())),
    "one hot": (ONE_HOT, lambda x: bool((x.sum(-1) == 1).all()) and int(x.max()) == 1),
    "one hot, floating": (ONE_HOT.float(), lambda x: bool((x.sum(-1) == 1).all())),
    "indices": (IDS, same_numbers(IDS)),
    "indices, floating": (IDS.float(), same_numbers(IDS.float())),
    "infinities": (MASK, lambda x: torch.equal(x.isinf(), MASK.isinf())),
    "complex": (torch.complex(A, A.flip(0)), lambda x: x.is_complex()),
    "bfloat16": (torch.rand(4, 4, generator=G).bfloat16(), lambda x: bool(((x >= 0) & (x <= 1)).all())),
    "a probability": (torch.tensor(0.9), lambda x: 0 < x < 1),
    "a number above 1": (torch.tensor(1.5), lambda x: x >= 1.5),
    "zeros": (torch.zeros(4, 4), lambda x: bool((x < 0).any())),
    "ones": (torch.ones(3, 4), lambda x: bool((x < 0).any())),
    "anything": (NORMAL, lambda x: bool((x < 0).any()) and bool(x[:, 2].std() > x[:, 0].std())),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_kept(name: str) -> None:
    example, holds = EXAMPLES[name]
    for seed in range(5):
        x = random_like(example, torch.Generator().manual_seed(seed))
        assert x.shape == example.shape and x.dtype == example.dtype
        assert holds(x) and not torch.equal(x, example)


@pytest.mark.parametrize("example", [OFFSETS, torch.tensor([True, False]), torch.zeros(0, 3), 3, None])
def test_what_has_no_other_value(example: object) -> None:
    other = random_like(example, torch.Generator().manual_seed(0))
    assert torch.equal(other, example) if isinstance(example, Tensor) else other is example


class Function(nn.Module):
    def __init__(self, call: Callable):
        super().__init__()
        self.call = call

    def forward(self, *args: Tensor) -> Tensor:
        return self.call(*args)


@pytest.mark.parametrize(
    ("call", "args"),
    [
        (torch.cholesky, (SPD,)),
        (F.binary_cross_entropy, (torch.rand(4, generator=G), torch.rand(4, generator=G))),
        (torch.quantile, (NORMAL, torch.tensor([0.2, 0.9]))),
        (lambda x, q: x.quantile(q), (NORMAL, torch.tensor(0.4))),
        (torch.special.logit, (torch.rand(4, generator=G),)),
        (torch.acosh, (NORMAL.abs() + 1,)),
        (F.nll_loss, (NORMAL, torch.tensor([0, 5, 1, 2, 2]))),
        (torch.linalg.solve_triangular, None),
    ],
)
def test_operators_run_on_their_random_input(call: Callable, args: tuple | None) -> None:
    if args is None:
        args, call = (
            (A.tril() + torch.eye(4), NORMAL[:4]),
            lambda a, b: torch.linalg.solve_triangular(a, b, upper=False),
        )
    program = capture(Function(call), args)
    (result,) = program.run(*probes(program)[1])
    assert result.isfinite().all()
    assert observe(program).skipped == ""


def test_an_exact_pass_is_compared_beyond_the_range_of_the_example() -> None:
    """The example has no negative number; the pass that drops the rectifier is wrong for all that."""
    program = capture(Function(torch.relu), (torch.rand(3, 4, generator=G),))
    wrong = capture(Function(lambda x: x * 1), program.probe)
    assert compare_programs(observe(program), wrong).exceeds(1e-9)


def test_a_model_that_fails_on_random_input_is_compared_on_its_example() -> None:
    def picky(a: Tensor, b: Tensor) -> Tensor:
        return NORMAL[0][a + b]  # the two always sum to 5: what no example of one of them shows

    a = torch.tensor([5, 0, 4, 1, 3, 2, 0, 5])
    observed = observe(capture(Function(picky), (a, 5 - a)))
    assert len(observed.probes) == 1 and observed.skipped.startswith("IndexError: index")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_keep_their_numbers(dtype: torch.dtype) -> None:
    """Numbers above the largest signed one among them; torch itself subtracts and sorts none of these."""
    largest = torch.iinfo(dtype).max
    example = torch.tensor([5, largest, 0, largest // 2 + 1], dtype=dtype)
    probe = random_like(example, torch.Generator().manual_seed(0))
    assert probe.dtype == dtype and sorted(probe.tolist()) == sorted(example.tolist())
