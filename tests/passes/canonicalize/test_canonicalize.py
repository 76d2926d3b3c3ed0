"""Canonicalisation: every spelling before, one spelling after, the same function; and what is refused, by its message."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from helpers.modules import Function
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

aten = torch.ops.aten
SHRINK, SDPA = torch.ops.thresher.shrink.default, aten.scaled_dot_product_attention.default


def canonical(
    model: nn.Module, *inputs: Tensor, passes=pipelines.canonicalize
) -> tuple[Program, dict[str, PassRecord]]:
    program = capture(model.eval(), inputs)
    manager = PassManager(passes, "each")
    result = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    assert not compare_programs(observe(program), result).exceeds(EXACT_TOLERANCE)
    return result, {r.name: r for r in manager.records}


def count(program: Program, target) -> int:
    return len(list(program.calls(target)))


# ---------------------------------------------------------------------- constants


def test_masks_parametrizations_and_grids_are_evaluated() -> None:
    torch.manual_seed(0)
    masked = nn.Linear(6, 6)
    prune.l1_unstructured(masked, "weight", 0.5)
    normed = parametrizations.weight_norm(nn.Linear(6, 6))
    model = Function(lambda x, a, b: b(a(x)) * torch.arange(6) + torch.ones(6).cumsum(0), masked, normed)
    program, _ = canonical(model, torch.randn(2, 6))
    assert [n.target for n in program.calls()] == [
        aten.linear.default,
        aten.linear.default,
        aten.mul.Tensor,
        aten.add.Tensor,
    ]


def test_a_mask_used_often_becomes_one_constant() -> None:
    layer = nn.Linear(6, 6, bias=False)
    prune.l1_unstructured(layer, "weight", 0.5)
    program, _ = canonical(Function(lambda x, a: a(a(a(x).relu()).relu()), layer), torch.randn(2, 6))
    assert len(program.constants) == 1


def test_random_numbers_are_not_constants() -> None:
    program = capture(Function(lambda x: x + torch.rand(3)), (torch.randn(3),))
    result = PassManager(["evaluate-constants"], "off").run(program)
    assert any("rand" in str(n.target) for n in result.calls())


# ---------------------------------------------------------------------- simplify


def test_no_ops_go() -> None:
    def f(x: Tensor) -> Tensor:
        y = F.dropout(x.clone().detach(), 0.5, False) * 1 + 0
        return y[:, :].view(y.shape).to(torch.float32).contiguous().relu()

    program, _ = canonical(Function(f), torch.randn(2, 6))
    assert [n.target for n in program.calls()] == [aten.relu.default]


def test_parts_become_slices() -> None:
    def f(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        c, d, e = b.split([1, 1, 1], -1)
        return torch.cat([a * c, d - e], -1) + torch.stack(x.unbind(0)).sum()

    program, _ = canonical(Function(f), torch.randn(2, 6))
    assert count(program, aten.slice.Tensor) >= 4
    assert not any("split" in str(n.target) or "chunk" in str(n.target) for n in program.calls())


@pytest.mark.parametrize("spelling", ["matmul", "mm", "addmm", "einsum"])
def test_products_with_a_constant_are_linear(spelling: str) -> None:
    w, b = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = w, b

        def forward(self, x: Tensor) -> Tensor:
            if spelling == "einsum":
                return torch.einsum("ni,io->no", x, self.w)
            return torch.addmm(self.b, x, self.w) if spelling == "addmm" else getattr(torch, spelling)(x, self.w)

    program, _ = canonical(Product(), torch.randn(3, 6))
    assert count(program, aten.linear.default) == 1


# ---------------------------------------------------------------------- attention

Q, K, V = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
BELOW = torch.ones(5, 5, dtype=torch.bool).tril()
ATTENTION: dict[str, Callable] = {
    "divide": lambda q, k, v: (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(-1) @ v,
    "multiply": lambda q, k, v: torch.softmax(torch.matmul(q, k.mT) * 0.5, dim=-1) @ v,
    "scaled queries": lambda q, k, v: ((q * 0.5) @ k.mT).softmax(-1) @ v,
    "no scale": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "mask": lambda q, k, v: (q @ k.mT / 2 + v[0, 0, :, :1].T).softmax(-1) @ v,
    "mask first": lambda q, k, v: (v[0, 0, :, :1].T + q @ k.mT).softmax(-1) @ v,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v,
    "where": lambda q, k, v: torch.where(BELOW, q @ k.mT / 2, -math.inf).softmax(-1) @ v,
    "masked fill": lambda q, k, v: (q @ k.mT / 2).masked_fill(~BELOW, -1e9).softmax(-1) @ v,
    "masked and biased": lambda q, k, v: ((q @ k.mT).masked_fill(~BELOW, -1e9) + v[0, 0, :, :1].T).softmax(-1) @ v,
    "biased, then scaled": lambda q, k, v: ((q @ k.mT + v[0, 0, :, :1].T) * 0.5).softmax(-1) @ v,
    "scaled by head": lambda q, k, v: ((q @ k.mT) * v[0, :, :1, :1]).softmax(-1) @ v,
    "windows": lambda q, k, v: ((q @ k.mT).view(1, 2, 3, 5, 5) + v[0, 0, :, :1].T).view(2, 3, 5, 5).softmax(-1) @ v,
    "alibi by baddbmm": lambda q, k, v: (
        torch.baddbmm(
            v[:, :, 0, :1].reshape(6, 1, 1) * torch.arange(5), q.reshape(6, 5, 4), k.reshape(6, 5, 4).mT, alpha=0.5
        )
        .view(2, 3, 5, 5)
        .softmax(-1)
        .view(6, 5, 5)
        .bmm(v.reshape(6, 5, 4))
        .view(2, 3, 5, 4)
    ),
    "channels first": lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT,
    "in float64 between": lambda q, k, v: (q @ k.mT).double().softmax(-1).float() @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q[0], k[0].mT).softmax(-1), v[0]),
    "einsum": lambda q, k, v: torch.einsum("bhls,bhsd->bhld", torch.einsum("bhld,bhsd->bhls", q, k).softmax(-1), v),
    "split heads": lambda q, k, v: (
        (
            q.transpose(1, 2).reshape(2, 5, 3, 4).permute(0, 2, 1, 3)
            @ k.permute(0, 2, 1, 3).reshape(2, 5, 3, 4).permute(0, 2, 3, 1)
        ).softmax(-1)
        @ v
    ),
}


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_attention_spellings(name: str) -> None:
    program, _ = canonical(Function(ATTENTION[name]), Q, K, V)
    assert count(program, SDPA) == 1 and count(program, aten.softmax.int) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q, k, v: (lambda w: w @ v + w.sum())((q @ k.mT).softmax(-1)), "used besides"),
        (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "not over the keys"),
        (lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, "not a scaled product"),
        (lambda q, k, v: ((q @ k.mT + v[..., :1].mT).tanh() * 3).softmax(-1) @ v, "capped"),
        (lambda q, k, v: torch.where(BELOW, q @ k.mT, 0.0).softmax(-1) @ v, "not a large negative number"),
        (lambda q, k, v: (q @ k.mT).transpose(0, 1).reshape(2, 3, 5, 5).softmax(-1) @ v, "change places"),
    ],
)
def test_what_is_no_attention_site(function: Callable, message: str) -> None:
    program, records = canonical(Function(function), Q, K, V)
    assert count(program, SDPA) == 0
    assert message in records["canonicalize-attention"].refusals[0].message


def test_masks_are_not_trained() -> None:
    """What stands for masked and allowed scores is no parameter of the model that rewrite returns."""
    masked = Function(lambda q, k, v: (q @ k.mT).masked_fill(q[0, 0, :, :1] > 0, -1e9).softmax(-1) @ v)
    program, _ = canonical(masked, Q, K, V)
    assert count(program, SDPA) == 1 and program.constants and not list(to_module(program).parameters())


def test_capped_scores() -> None:
    program, _ = canonical(
        Function(lambda q, k, v: (torch.tanh(q @ k.mT / 2 / 5) * 5 + BELOW.log()).softmax(-1) @ v), Q, K, V
    )
    assert count(program, torch.ops.thresher.sparse_attention.default) == 1 and count(program, aten.softmax.int) == 0


def test_talking_heads_are_named() -> None:
    mix = nn.Linear(3, 3)
    talking = Function(lambda q, k, v, m: m((q @ k.mT).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v, mix)
    _, records = canonical(talking, Q, K, V)
    assert "talking heads" in records["canonicalize-attention"].refusals[0].message


def test_multihead_attention_module() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    program, _ = canonical(Function(lambda x, a: a(x, x, x)[0], layer), torch.randn(2, 5, 8))
    assert count(program, SDPA) == 1
    program, _ = canonical(Function(lambda x, a: a(x, x, x, need_weights=False)[0], layer), torch.randn(2, 5, 8))
    assert count(program, SDPA) == 1


# ---------------------------------------------------------------------- batch norm


@pytest.mark.parametrize(
    ("model", "shape", "left"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 7, 7), 1),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 7), 1),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)), (2, 3, 7, 7), 3),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 7, 7), 3),
    ],
)
def test_batch_norm_folds(model: nn.Module, shape: tuple[int, ...], left: int) -> None:
    """Into the layer before, else into the layer after where no padding shows, else into one mul and one add."""
    from thresher.testing import settle

    program, _ = canonical(settle(model), torch.randn(shape), passes=[*pipelines.canonicalize, "fold-batch-norm"])
    assert len(list(program.calls())) == left


def test_what_is_computed_twice_is_computed_once() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.relu().sum(-1), x.relu().sum(-1)
            return a + b + x.relu().sum(0)

    x = torch.randn(3, 3)
    program = PassManager(["simplify"]).run(capture(Twice(), (x,)))
    targets = [n.target for n in program.calls()]
    assert targets.count(torch.ops.aten.relu.default) == 1 and targets.count(torch.ops.aten.sum.dim_IntList) == 2
    assert torch.equal(program.run(x)[0], Twice()(x))


def test_numbers_of_other_kinds_are_not_the_same() -> None:
    class Kinds(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x + 1, x + 1.0, x.float() / 0.0, x.float() / -0.0]

    x = torch.tensor([1, 2, 3])
    program = PassManager(["simplify"]).run(capture(Kinds(), (x,)))
    for wanted, found in zip(Kinds()(x), program.run(x)):
        assert wanted.dtype is found.dtype and torch.equal(wanted, found)
