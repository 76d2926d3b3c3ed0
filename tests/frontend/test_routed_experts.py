"""Experts are captured in fixed shapes: whatever function transformers would compute them by, and products of groups of rows."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
import thresher.ops
from thresher.errors import CaptureError
from thresher.frontend.capture import capture
from thresher.frontend.routed_experts import TABLE
from thresher.verification.compare import compare

ops = torch.ops.thresher


class Table(dict):
    """The functions that compute experts, by name, as transformers keeps them."""

    def get_interface(self, name, default):
        return self.get(name, default)


@pytest.fixture
def table(monkeypatch) -> Table:
    """transformers' module of experts, as it is from version 5 on."""
    module = ModuleType(TABLE)
    module.ALL_EXPERTS_FUNCTIONS = Table()
    monkeypatch.setitem(sys.modules, TABLE, module)
    return module.ALL_EXPERTS_FUNCTIONS


class Experts(nn.Module):
    """A layer as transformers decorates it: its forward asks the table, and loops over the experts that were hit by default."""

    is_transposed = has_bias = has_post_expert_norm = False
    has_gate = True

    def __init__(self, table: Table, implementation: str | None):
        super().__init__()
        self.table, self.config = table, SimpleNamespace(_experts_implementation=implementation)
        generator = torch.Generator().manual_seed(0)
        inputs, inner = 8, 2 * 6 if self.has_gate else 6
        shapes = [(4, inner, inputs), (4, inputs, 6)]
        shapes = [(e, k, n) if self.is_transposed else (e, n, k) for e, n, k in shapes]
        up, down = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes)
        setattr(self, "gate_up_proj" if self.has_gate else "up_proj", up)
        self.down_proj = down
        if self.has_bias:
            setattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias", nn.Parameter(torch.randn(4, inner)))
            self.down_proj_bias = nn.Parameter(torch.randn(4, inputs))
        self.post_expert_norm = nn.LayerNorm(inputs)

    def act_fn(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def linear(self, name: str, x: Tensor, expert: Tensor) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(x, weight.T if self.is_transposed else weight, bias)

    def loop(self, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        mask = F.one_hot(experts, 4).permute(2, 1, 0)
        for (expert,) in (mask.sum((-1, -2)) > 0).nonzero():
            position, token = torch.where(mask[expert])
            value = self.linear("gate_up_proj" if self.has_gate else "up_proj", hidden[token], expert)
            value = self._apply_gate(value) if self.has_gate else self.act_fn(value)
            value = self.linear("down_proj", value, expert)
            value = self.post_expert_norm(value) if self.has_post_expert_norm else value
            result.index_add_(0, token, value * shares[token, position, None])
        return result

    def forward(self, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        function = self.table.get_interface(self.config._experts_implementation, type(self).loop)
        return function(self, hidden, experts, shares)


class Transposed(Experts):
    is_transposed = has_bias = True


class Plain(Experts):
    has_gate, has_post_expert_norm = False, True


class Mixture(nn.Module):
    def __init__(self, experts: nn.Module):
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), experts

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x).softmax(-1).topk(2, -1)
        return self.experts(x, chosen, shares / shares.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", [Experts, Transposed, Plain])
@pytest.mark.parametrize("implementation", [None, "eager", "batched_mm", "grouped_mm"])
def test_experts_of_transformers(table: Table, kind: type[Experts], implementation: str | None) -> None:
    torch.manual_seed(0)
    model, x = Mixture(kind(table, implementation)).eval(), torch.randn(7, 8)
    program = capture(model, (x,))
    assert len(list(program.calls(ops.expert_linear.default))) == 2
    with torch.no_grad():
        assert not compare([model(x)], program.run(x)).exceeds(1e-5)
    assert "get_interface" not in vars(table)  # the table is as it was


def test_a_function_of_the_users_is_kept(table: Table) -> None:
    table["mine"] = lambda layer, hidden, experts, shares: 2 * hidden
    program = capture(Mixture(Experts(table, "mine")).eval(), (torch.randn(7, 8),))
    assert not list(program.calls(ops.expert_linear.default))


def test_a_model_is_compiled(table: Table) -> None:
    torch.manual_seed(0)
    model, x = Mixture(Experts(table, "eager")).eval(), torch.randn(7, 8)
    compiled = thresher.compile(model, (x,))  # it validates
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


class Groups(nn.Module):
    """Rows sorted by expert, and where each expert's end."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 24, 16).to(dtype))

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        taken, order = torch.sort(experts)
        ends = torch.histc(taken.float(), bins=5, min=0, max=4).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x[order], self.weight.transpose(-2, -1), offs=ends)[order.argsort()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_groups_of_rows(dtype: torch.dtype) -> None:
    """torch itself exports them for bfloat16 only; what it exported is decomposed."""
    torch.manual_seed(0)
    model, inputs = Groups(dtype).eval(), (torch.randn(20, 16).to(dtype), torch.randint(0, 5, (20,)))
    sources = [model] if dtype is torch.float32 else [model, torch.export.export(model, inputs)]
    for source in sources:
        program = capture(source, inputs)
        assert len(list(program.calls(ops.expert_linear.default))) == 1
        assert not compare([model(*inputs)], program.run(*inputs)).exceeds(1e-5 if dtype is torch.float32 else 1e-2)


def test_rows_after_the_last_group_are_zero() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(x, self.weight, offs=ends)

    x, ends = torch.randn(6, 16), torch.tensor([1, 4], dtype=torch.int32)
    assert not capture(Ends(), (x, ends)).run(x, ends)[0][4:].any()


def test_groups_of_sums_are_refused() -> None:
    class Sums(nn.Module):
        def forward(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
            return F.grouped_mm(a, b, offs=ends)

    ends = torch.tensor([16, 32], dtype=torch.int32)
    with pytest.raises(CaptureError, match=r"use torch\.bmm where all groups are equal"):
        capture(Sums(), (torch.randn(8, 32), torch.randn(32, 16), ends))
