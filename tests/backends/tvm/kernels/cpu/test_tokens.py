"""Token reduction: the operators by their definition, the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.cuda import compiled_code
from helpers.nvrtc import kernels
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.ops.tokens import GOES, STAYS, TAKES
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

ops = torch.ops.thresher


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Reduce(nn.Module):
    def __init__(self, kind: str, count: int, protected: int, every: int, drop: bool):
        super().__init__()
        self.how, self.count, self.drop = (kind, count, protected, every), count, drop

    def forward(self, x: Tensor, size: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        side = ops.token_sides(scores, size, *self.how)
        unit = x / x.norm(dim=-1, keepdim=True)
        assign, sizes, own = ops.match_tokens(unit @ unit.mT, size, side, self.count, self.drop)
        reduced = ops.reduce_tokens(x, size, assign, x.shape[1] - self.count)
        return side, assign, sizes, reduced, ops.restore_tokens(reduced, assign, 1), own


MODELS = st.builds(
    Reduce,
    st.sampled_from(["alternate", "lowest", "energy"]),
    st.integers(1, 7),
    st.integers(0, 2),
    st.sampled_from([0, 0, 5]),
    st.booleans(),
)


@given(MODELS, st.integers(20, 40), st.integers(0, 1000))
@settings(max_examples=18, deadline=None)
def test_what_a_reduction_is(model: Reduce, tokens: int, seed: int) -> None:
    x, size = rand(2, tokens, 6, seed=seed).double(), torch.ones(2, tokens)
    size[1, tokens - 3 :] = 0
    side, assign, sizes, reduced, restored, own = model(x, size, rand(2, tokens, seed=seed + 1))
    gone = model.count
    for b in range(2):
        kept = [i for i in range(tokens) if side[b, i] != GOES or (assign[b, :i] != assign[b, i]).all()]
        assert assign[b][own[b] == 1].tolist() == list(range(tokens - gone))
        assert sorted(set(assign[b].tolist()) - {-1}) == list(range(tokens - gone))  # every slot is somebody's
        assert assign[b, : model.how[2]].tolist() == list(range(model.how[2]))  # the protected keep their places
        assert len(kept) >= tokens - gone
    assert bool((side[:, : model.how[2]] == STAYS).all())
    if not model.drop:
        torch.testing.assert_close(sizes.sum(1), size.sum(1))
        total = (reduced * sizes.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(total, (x * size.unsqueeze(-1)).sum(1))  # means are kept
    torch.testing.assert_close(
        restored[0, 0], reduced[0, assign[0, 0]] if assign[0, 0] >= 0 else torch.zeros(6).double()
    )


def test_padding_goes_first() -> None:
    size = torch.tensor([[1.0, 1, 1, 0, 1, 0, 1, 0]])
    _, assign, sizes, *_ = Reduce("lowest", 3, 0, 0, True)(rand(1, 8, 4), size, rand(1, 8, seed=1))
    assert [i for i in range(8) if assign[0, i] == -1] == [3, 5, 7] and sizes.tolist() == [[1.0] * 5]
    _, assign, sizes, *_ = Reduce("energy", 2, 0, 0, False)(rand(1, 8, 4), size, rand(1, 8, seed=1))
    assert sizes.sum() == 5 and len({3, 5} & {i for i in range(8) if (assign[0] == assign[0, i]).sum() > 1}) == 2


def test_nearest_partner_takes() -> None:
    x = torch.tensor([[[1.0, 0], [0, 1.0], [1.0, 0.1], [0.1, 1.0]]])
    side = torch.tensor([[TAKES, TAKES, GOES, GOES]])
    unit = x / x.norm(dim=-1, keepdim=True)
    assign, sizes, _ = ops.match_tokens(unit @ unit.mT, torch.ones(1, 4), side, 2, False)
    assert assign.tolist() == [[0, 1, 0, 1]] and sizes.tolist() == [[2.0, 2.0]]


@given(MODELS, st.integers(20, 70), st.sampled_from([6, 16, 40]), st.booleans(), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_kernels_are_the_reference(model: Reduce, tokens: int, channels: int, wide: bool, seed: int) -> None:
    """``wide``: in float64, which no kernel of ours is for: what other targets get, too."""
    size = (torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) * 3).round()
    inputs: tuple[Tensor, ...] = (rand(2, tokens, channels, seed=seed), size, rand(2, tokens, seed=seed + 1))
    inputs = tuple(t.double() for t in inputs) if wide else inputs
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(capture(model, inputs)).rounded()
    found = TVMBackend().lower(program, "cpu").run(inputs)
    assert not compare(model(*inputs), found).exceeds(1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradients(dim: int) -> None:
    x, assign = rand(2, 4, 4).double().requires_grad_(), torch.tensor([[0, 1, -1, 2, 3, 0], [1, 1, 2, 2, 3, 0]])
    assert torch.autograd.gradcheck(lambda x: ops.restore_tokens(x, assign, dim), x)
    wide = rand(2, 6, 3).double().requires_grad_()
    size = torch.rand(2, 6).double()
    assert torch.autograd.gradcheck(lambda x: ops.reduce_tokens(x, size, assign, 4), wide)


def test_tokens_are_reduced_on_a_gpu() -> None:
    """Translated for one, not run."""
    code = compiled_code(
        Reduce("lowest", 5, 1, 0, False), (rand(2, 40, 16), torch.ones(2, 40), rand(2, 40, seed=1)), "sm_80"
    )
    assert kernels(code, "sm_80")
