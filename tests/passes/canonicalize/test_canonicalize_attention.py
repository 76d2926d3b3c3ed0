"""Attention: every spelling before, one site after, the same function; and what is refused, by its message."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.canonical import canonical, count
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.program import Program

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
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
    "masked by the largest number that is large": lambda q, k, v: (q @ k.mT).masked_fill(~BELOW, -1e4).softmax(-1) @ v,
    "where, the other way": lambda q, k, v: torch.where(~BELOW, -1e9, q @ k.mT / 2).softmax(-1) @ v,
    "batch and windows": lambda q, k, v: ((q[None] @ k[None].mT).softmax(-1) @ v[None])[0],
    "windows with a bias of the keys": lambda q, k, v: ((q[None] @ k[None].mT + v[0, 0, :, 0]).softmax(-1) @ v[None])[
        0
    ],
    "bias divided": lambda q, k, v: ((q @ k.mT + v[0, 0, :, :1].T) / 4).softmax(-1) @ v,
    "two biases": lambda q, k, v: (q @ k.mT + v[0, 0, :, :1].T + q[0, :, :1, :1]).softmax(-1) @ v,
    "factor first": lambda q, k, v: (v[0, :, :1, :1] * (q @ k.mT)).softmax(-1) @ v,
    "scaled by baddbmm alone": lambda q, k, v: (
        torch.baddbmm(q[0] @ k[0].mT, q[0], k[0].mT, beta=0, alpha=0.25).softmax(-1) @ v[0]
    ),
    "scaled by baddbmm": lambda q, k, v: (
        torch.baddbmm(v[0, :, :, :1].mT.expand(3, 5, 5), q[0], k[0].mT, beta=3.0, alpha=0.25).softmax(-1) @ v[0]
    ),
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


def test_a_softmax_without_a_product_is_no_attention() -> None:
    """Nothing is said of it, also where a layer follows."""
    layer = nn.Linear(5, 3)
    for function in (lambda q, a: a(q.mT.softmax(-1)), lambda q, a: q.softmax(-1).sum(-1), lambda q, a: q.softmax(-1)):
        _, records = canonical(Function(function, layer), Q)
        assert not records["canonicalize-attention"].refusals


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


def test_multihead_attention_module() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    program, _ = canonical(Function(lambda x, a: a(x, x, x)[0], layer), torch.randn(2, 5, 8))
    assert count(program, SDPA) == 1
    program, _ = canonical(Function(lambda x, a: a(x, x, x, need_weights=False)[0], layer), torch.randn(2, 5, 8))
    assert count(program, SDPA) == 1


BEFORE = """\
program model {
  %q = input : f32[1, 2, 5, 4]
  %k = input : f32[1, 2, 5, 4]
  %v = input : f32[1, 2, 5, 4]
  %transposed = aten.permute.default(%k, [0, 1, 3, 2]) : f32[1, 2, 4, 5]
  %product = aten.matmul.default(%q, %transposed) : f32[1, 2, 5, 5]
  %scores = aten.mul.Tensor(%product, 0.5) : f32[1, 2, 5, 5]
  %weights = aten.softmax.int(%scores, -1) : f32[1, 2, 5, 5]
  %y = aten.matmul.default(%weights, %v) : f32[1, 2, 5, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 2, 5, 4]
  %k = input : f32[1, 2, 5, 4]
  %v = input : f32[1, 2, 5, 4]
  %attention = aten.scaled_dot_product_attention.default(%q, %k, %v, scale=0.5) : f32[1, 2, 5, 4]
  return [%attention]
}
"""


def test_before_and_after() -> None:
    check_rewrite("canonicalize-attention", BEFORE, AFTER)


def spelled(function: Callable, *layers: nn.Module) -> Build:
    return lambda: (Function(function, *layers), Q, K, V)


def regrouped_and_dynamic() -> Program:
    """Values of another rank than the scores, and a free batch."""
    attend = lambda q, k, v: (q[:, 0] @ k[:, 0].mT).softmax(-1) @ v[:, 0][None]  # noqa: E731
    batch = torch.export.Dim("batch", min=2)
    return capture(Function(attend), (Q, K, V), dynamic_shapes=(({0: batch},) * 3,))


def talking(q: Tensor, k: Tensor, v: Tensor, mix: nn.Module) -> Tensor:
    return mix((q @ k.mT).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


REFUSALS = [
    (
        "the scores change places between the product and the softmax",
        spelled(lambda q, k, v: (q @ k.mT).transpose(0, 1).reshape(2, 3, 5, 5).softmax(-1) @ v),
    ),
    (
        "the scores are not a scaled product of queries and keys",
        lambda: (Function(lambda scores, v: scores.softmax(-1) @ v), Q @ K.mT, V),
    ),
    ("*: the scores are used besides the softmax", spelled(lambda q, k, v: (s := q @ k.mT).softmax(-1) @ v + s.sum())),
    (
        "the scores are not a scaled product of queries and keys: * is between",
        spelled(lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v),
    ),
    ("*: the bias is not added to rows of scores", spelled(lambda q, k, v: (q @ k.mT + v.sum()).softmax(-1) @ v)),
    ("the scores are scaled by a tensor", spelled(lambda q, k, v: (q @ k.mT / v.sum()).softmax(-1) @ v)),
    (
        "the scores are scaled by a tensor that is not one number per head",
        spelled(lambda q, k, v: (q @ k.mT * v[0, 0, :, :1]).softmax(-1) @ v),
    ),
    (
        "biased scores are scaled by a tensor",
        spelled(lambda q, k, v: ((q @ k.mT + v[..., :1].mT) * v[0, :, :1, :1]).softmax(-1) @ v),
    ),
    (
        "the scores are capped, and not after the scale and before the mask",
        spelled(lambda q, k, v: ((q @ k.mT + v[..., :1].mT).tanh() * 3).softmax(-1) @ v),
    ),
    (
        "the scores are capped, and not after the scale and before the mask",
        spelled(lambda q, k, v: (((q @ k.mT).tanh() * 3).masked_fill(~BELOW, -1e9) * 2).softmax(-1) @ v),
    ),
    (
        "the scores are capped, and not after the scale and before the mask",
        spelled(lambda q, k, v: ((q @ k.mT).tanh() * -3).softmax(-1) @ v),
    ),
    (
        "the scores are capped, and not after the scale and before the mask",
        spelled(lambda q, k, v: (((q @ k.mT).tanh() * 3).tanh() * 2).softmax(-1) @ v),
    ),
    (
        "*: scores are replaced by something that is not a large negative number",
        spelled(lambda q, k, v: (q @ k.mT).masked_fill(~BELOW, -9999.0).softmax(-1) @ v),
    ),
    (
        "*: scores are replaced by something that is not a large negative number",
        spelled(lambda q, k, v: torch.where(BELOW, q @ k.mT, 0.0).softmax(-1) @ v),
    ),
    (
        "*: masked scores are multiplied by a number that is not positive",
        spelled(lambda q, k, v: ((q @ k.mT).masked_fill(~BELOW, -1e9) * -1.0).softmax(-1) @ v),
    ),
    (
        "talking heads: the weights of several heads are mixed before they meet the values",
        spelled(talking, nn.Linear(3, 3)),
    ),
    (
        "the attention weights are used besides the product with the values",
        spelled(lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.sum()),
    ),
    (
        "the attention weights are used besides the product with the values",
        spelled(lambda q, k, v: (w := (q @ k.mT).softmax(-1)).reshape(6, 5, 5) @ v.reshape(6, 5, 4) + w.sum()),
    ),
    ("the softmax is not over the keys", spelled(lambda q, k, v: (q @ k.mT).softmax(-2) @ v)),
    (
        "the attention weights change places before the product with the values",
        spelled(lambda q, k, v: (q @ k.mT).softmax(-1).transpose(0, 1).reshape(2, 3, 5, 5) @ v),
    ),
    (
        "queries, keys and values are not of one type",
        spelled(lambda q, k, v: (q.double() @ k.double().mT).softmax(-1).float() @ v),
    ),
    ("batch and heads are regrouped, and dynamic", regrouped_and_dynamic),
    (
        "queries, keys and values are broadcast against each other",
        lambda: (Function(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), Q, K[:, :1], V),
    ),
    (
        "capped scores of another rank than [batch, heads, queries, keys]",
        spelled(lambda q, k, v: (torch.tanh(q[0] @ k[0].mT / 5) * 5).softmax(-1) @ v[0]),
    ),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("canonicalize-attention", sentence, build, ("evaluate-constants", "simplify"))
