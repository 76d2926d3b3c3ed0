"""fold-channels on experts that a router chooses: those that no route reaches, those whose weights are 0, and their hidden units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
import thresher.ops
from thresher.errors import ProgramError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.rewriting.contract import Context, PassResult
from thresher.rewriting.manager import PassManager
from thresher.verification.certificate import Certificate, Step
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe
from thresher.verification.verifier import verify

aten, ops = torch.ops.aten, torch.ops.thresher
EXPERTS, HIDDEN, INNER = 6, 8, 12


def softmax_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mixtral: the shares of the chosen ones add up to 1."""
    shares, chosen = logits.softmax(-1).topk(k, -1)
    return shares / shares.sum(-1, keepdim=True), chosen


def choice_first(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """gpt-oss: a softmax over what was chosen."""
    values, chosen = logits.topk(k, -1)
    return values.softmax(-1), chosen


class Mixture(nn.Module):
    def __init__(self, route: Callable = softmax_first, k: int = 2, bias: bool = False):
        super().__init__()
        self.route, self.k, self.router = route, k, nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 3)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN)) if bias else None

    def experts(self, x: Tensor, chosen: Tensor) -> Tensor:
        gate, up = ops.expert_linear(x[:, None], chosen, self.up, self.up_bias).flatten(0, 1).chunk(2, -1)
        return ops.expert_linear(F.silu(gate) * up, chosen.flatten(), self.down, self.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.route(self.router(x), self.k)
        return (self.experts(x, chosen).unflatten(0, chosen.shape) * shares[..., None]).sum(1)

    def close(self, *routes: int) -> Mixture:
        """Routes that no input takes: their scores are -inf."""
        with torch.no_grad():
            self.router.weight[list(routes)] = 0
            self.router.bias[list(routes)] = -torch.inf
        return self

    def empty(self, *experts: int) -> Mixture:
        """Experts that a pruner has set to 0 where they write."""
        with torch.no_grad():
            self.down[list(experts)] = 0
            if self.down_bias is not None:
                self.down_bias[list(experts)] = 0
        return self


class Scored(Mixture):
    """DeepSeek-V3: the choice is corrected by a bias, the shares are not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correction", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        chosen = (scores + self.correction).topk(self.k, -1, sorted=False).indices
        shares = scores.gather(1, chosen)
        return (self.experts(x, chosen).unflatten(0, chosen.shape) * shares[..., None]).sum(1)


class Grouped(Scored):
    """DeepSeek-V3: the best group first, then the best experts of it; the others are closed by a mask."""

    def __init__(self, groups: int, masked: bool = True):
        super().__init__()
        self.groups, self.masked = groups, masked

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        corrected = scores + self.correction
        best = corrected.unflatten(-1, (self.groups, -1)).amax(-1).topk(1, -1, sorted=False).indices
        mask = torch.zeros(len(x), self.groups).scatter(1, best, 1)
        mask = mask.unsqueeze(-1).expand(-1, -1, EXPERTS // self.groups).reshape(-1, EXPERTS)
        if self.masked:
            corrected = corrected.masked_fill(~mask.bool(), -torch.inf)
        else:
            corrected = torch.where(mask > 0, corrected, -torch.inf)  # not a form that is known
        chosen = corrected.topk(self.k, -1, sorted=False).indices
        return (self.experts(x, chosen).unflatten(0, chosen.shape) * scores.gather(1, chosen)[..., None]).sum(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def folded(model: nn.Module, *args: Tensor) -> tuple[Program, PassResult]:
    """The program before and the result of the pass; it is exact, and its certificate holds."""
    before = PassManager(pipelines.canonicalize, "off").run(capture(model.eval(), args or (torch.randn(9, HIDDEN),)))
    result = FoldChannels(round_to=1).apply(before, Context())
    result.program.verify()
    assert not compare_programs(observe(before), result.program).exceeds(EXACT_TOLERANCE)
    if result.certificate is not None:
        verify(result.certificate)
    return before, result


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in program.constants.items()}


@pytest.mark.parametrize("route", [softmax_first, choice_first])
@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_that_no_route_reaches(route: Callable, bias: bool) -> None:
    _, result = folded(Mixture(route, bias=bias).close(2, 5))
    left = shapes(result.program)
    assert left["up"] == (4, 2 * INNER, HIDDEN) and left["down"] == (4, HIDDEN, INNER)
    assert left["router.weight"] == (4, HIDDEN) and left["router.bias"] == (4,)
    if bias:
        assert left["up_bias"] == (4, 2 * INNER) and left["down_bias"] == (4, HIDDEN)
    (topk,) = result.program.calls(aten.topk.default)
    assert tuple(topk.args[0].meta["val"].shape) == (9, 4)
    assert any("experts 6 -> 4" in note.message for note in result.rewrites)


@pytest.mark.parametrize("bias", [False, True])
def test_an_expert_without_weights(bias: bool) -> None:
    """It may be chosen, and then the others have smaller shares: the router stays. Of its first layer nobody reads what it computes."""
    _, result = folded(Mixture(bias=bias).empty(1, 4))
    left = shapes(result.program)
    assert left["up"] == (4, 2 * INNER, HIDDEN) and left["down"] == (4, HIDDEN, INNER)
    assert left["router.weight"] == (EXPERTS, HIDDEN)


def test_both_and_hidden_units() -> None:
    model = Mixture().close(2).empty(4)
    with torch.no_grad():
        model.up[:, 3] = 0  # the gate of a hidden unit, in all experts
    _, result = folded(model)
    assert shapes(result.program)["up"] == (4, 2 * (INNER - 1), HIDDEN)
    assert shapes(result.program)["down"] == (4, HIDDEN, INNER - 1)


def test_a_correction_of_the_choice() -> None:
    model = Scored()
    model.correction[[0, 3]] = -torch.inf
    _, result = folded(model)
    assert shapes(result.program)["up"][0] == shapes(result.program)["down"][0] == 4


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_that_are_chosen_first(groups: int) -> None:
    model = Grouped(groups)
    model.correction[[0, 3]] = -torch.inf
    _, result = folded(model)
    assert shapes(result.program)["up"][0] == shapes(result.program)["down"][0] == 4


def test_before_and_after() -> None:
    """The numbers of the routes that are left are looked up in those from before, and these at the new places of their experts."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.weight = nn.Linear(2, 3), nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return ops.expert_linear(x, self.router(x).topk(1).indices[:, 0], self.weight)

    model = Small()
    with torch.no_grad():
        model.router.weight[1], model.router.bias[1] = 0, -torch.inf
    before, result = folded(model, torch.randn(5, 2))
    assert "aten.index.Tensor" not in before.text()
    calls = [line.strip().split(" : ")[0] for line in result.program.text().splitlines() if " = " in line]
    assert calls[-6:] == [
        "%topk = aten.topk.default(%linear, 1)",
        "%getitem_1 = getitem(%topk, 1)",
        "%index_tensor = aten.index.Tensor(%getitem_1_table, [%getitem_1])",
        "%select = aten.select.int(%index_tensor, 1, 0)",
        "%index_tensor_1 = aten.index.Tensor(%expert_linear_table, [%select])",
        "%expert_linear = thresher.expert_linear.default(%x, %index_tensor_1, %weight)",
    ]
    assert result.program.constants["getitem_1_table"].tolist() == [0, 2]
    assert result.program.constants["expert_linear_table"].tolist() == [0, -1, 1]


def test_an_edge_marker_on_the_way_to_the_choice() -> None:
    """The scores are put in another order by groups, which holds a single one: the marker there does not hide that none is negative."""

    class Grouped(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            shares = self.router(x).softmax(-1).unflatten(-1, (2, 3)).transpose(1, 2).flatten(1)
            values, chosen = shares.topk(self.k, -1)
            return (self.experts(x, chosen).unflatten(0, chosen.shape) * values[..., None]).sum(1)

    _, result = folded(Grouped().close(2))
    assert shapes(result.program)["up"][0] == EXPERTS - 1


@given(st.sets(st.integers(0, 5), max_size=4), st.sets(st.integers(0, 5), max_size=6), st.integers(1, 3), st.booleans())
@settings(max_examples=12, deadline=None)
def test_what_is_left_is_the_same_function(closed, empty, k, first) -> None:
    model = Mixture(softmax_first if first else choice_first, k).close(*closed).empty(*empty)
    _, result = folded(model)
    reached = EXPERTS - len(closed) if EXPERTS - len(closed) >= k else EXPERTS
    if reached < EXPERTS or empty:
        expected = len(set(range(EXPERTS)) - (closed if reached < EXPERTS else set()) - empty)
        assert shapes(result.program).get("down", (0,))[0] in (max(1, expected), 0)


# ---------------------------------------------------------------------- refusals


def test_too_few_routes_are_left() -> None:
    _, result = folded(Mixture(k=3).close(0, 1, 2, 3))
    assert shapes(result.program)["up"] == (EXPERTS, 2 * INNER, HIDDEN)
    assert any("4 of 6 indices that are never the largest kept: 3 are chosen" in n.message for n in result.refusals)


@pytest.mark.parametrize(("closed", "masked"), [([0, 1], True), ([0, 3], False)])
def test_a_mask_may_leave_too_few(closed: list[int], masked: bool) -> None:
    """Then a closed one is chosen, and which one depends on the order: of a group, only one would be left of two that are chosen."""
    model = Grouped(2, masked)
    model.correction[closed] = -torch.inf
    _, result = folded(model)
    assert shapes(result.program)["up"][0] == EXPERTS
    assert any("it is not sure that as many are left in every row" in note.message for note in result.refusals)


def test_a_route_that_is_only_unlikely_stays() -> None:
    model = Mixture()
    with torch.no_grad():
        model.router.weight[2], model.router.bias[2] = 0, -1e4
    before, result = folded(model)
    assert result.program is before


def test_a_score_of_zero_stays_where_others_may_be_negative() -> None:
    model = Mixture(choice_first)
    with torch.no_grad():
        model.router.weight[2], model.router.bias[2] = 0, 0
    _, result = folded(model)
    assert shapes(result.program)["up"][0] == EXPERTS


def test_an_index_that_is_always_zero_stays_where_others_may_be_zero_too() -> None:
    """After relu: which of several zeros ``topk`` chooses depends on where they are."""

    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, EXPERTS)

        def forward(self, x: Tensor) -> Tensor:
            return self.router(x).relu().topk(4).indices

    model = Rectified()
    with torch.no_grad():
        model.router.weight[2], model.router.bias[2] = 0, -1
    _, result = folded(model)
    assert shapes(result.program)["router.weight"][0] == EXPERTS


def test_layers_whose_rows_are_in_another_order_are_no_pair() -> None:
    """As many tokens as choices: the first layer goes by the columns of a square, the second by its rows."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(HIDDEN, EXPERTS)
            self.up = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))
            self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.router(x).argmax(-1)
            hidden = ops.expert_linear(x[:, None].expand(-1, len(x), -1), chosen, self.up)
            return ops.expert_linear(hidden, chosen[:, None], self.down)

    model = Square()
    with torch.no_grad():
        model.down[1] = 0
    _, result = folded(model)
    assert shapes(result.program)["up"][0] == EXPERTS and shapes(result.program)["down"][0] == EXPERTS - 1


def test_it_is_not_known_which_experts_the_rows_take() -> None:
    class Given(Mixture):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            return self.experts(x, chosen)

    _, result = folded(Given().empty(1), torch.randn(4, HIDDEN), torch.tensor([[0, 1], [5, 2], [1, 1], [6, -1]]))
    assert shapes(result.program)["down"][0] == EXPERTS
    message = "1 of 6 experts without weights kept: it is not known which experts the rows take"
    assert any(message in note.message for note in result.refusals)


def test_a_first_layer_that_is_read_elsewhere_stays() -> None:
    class Watched(Mixture):
        def experts(self, x: Tensor, chosen: Tensor) -> Tensor:
            inner = ops.expert_linear(x[:, None], chosen, self.up).flatten(0, 1)
            gate, up = inner.chunk(2, -1)
            return ops.expert_linear(F.silu(gate) * up, chosen.flatten(), self.down) + inner.mean(0)[:HIDDEN]

    _, result = folded(Watched().empty(1))
    assert shapes(result.program)["up"][0] == EXPERTS and shapes(result.program)["down"][0] == EXPERTS - 1


# ---------------------------------------------------------------------- proofs and the way back


def certificate() -> Certificate:
    _, result = folded(Mixture().close(2).empty(4))
    assert result.certificate is not None
    return result.certificate


def test_the_certificate_is_saved_with_its_claims(tmp_path) -> None:
    proof = certificate()
    loaded = Certificate.load(proof.save(tmp_path / "proof.zip"))
    assert loaded.steps[0].nonnegative == proof.steps[0].nonnegative != frozenset()
    assert loaded.steps[0].unrouted.keys() == proof.steps[0].unrouted.keys() != set()
    assert verify(loaded) == verify(proof)
    verify(proof.detached())


def _negative(step: Step) -> Step:
    return replace(step, nonnegative=step.nonnegative | {"linear"})


def _another_expert(step: Step) -> Step:
    name, unread = next(iter(step.unrouted.values()))
    return replace(step, unrouted={value: (name, torch.ones_like(unread)) for value in step.unrouted})


def _no_claim(step: Step) -> Step:
    return replace(step, unrouted={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_negative, "linear .* is negative, which is claimed not to be"),
        (_another_expert, "depends on elements that are claimed to be unread"),
        (_no_claim, "has another value in the new program"),
    ],
)
def test_wrong_claims_are_found(change: Callable[[Step], Step], message: str) -> None:
    proof = certificate()
    with pytest.raises(ProgramError, match=message):
        verify(Certificate([change(proof.steps[0]), *proof.steps[1:]]))


def test_training_is_carried_back() -> None:
    model = Mixture().close(2).empty(4)
    small = thresher.rewrite(model, (torch.randn(9, HIDDEN),))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.5)
    state = small.unfold()
    kept = [0, 1, 3, 5]
    torch.testing.assert_close(state["up"][kept], 1.5 * model.up[kept])
    torch.testing.assert_close(state["up"][2], model.up[2])


def test_a_folded_mixture_is_compiled() -> None:
    model, x = Mixture(bias=True).close(2).empty(4).eval(), torch.randn(9, HIDDEN)
    compiled = thresher.compile(model, (x,))  # it validates
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
