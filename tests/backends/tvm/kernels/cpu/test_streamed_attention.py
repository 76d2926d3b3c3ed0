"""Attention over lists of blocks: the reference against masked attention, the kernels against the reference, and what they skip."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from helpers.modules import Function
from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.ops.sparse_attention import block_lists, block_mask
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

sparse_attention = torch.ops.thresher.sparse_attention.default


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_lists(shape: tuple[int, ...], seed: int, density: float = 0.5) -> tuple[Tensor, Tensor]:
    """Lists for a random block mask [b, h, query blocks, key blocks]; some rows may be empty."""
    return block_lists(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density)


def spread(grid: Tensor, block_q: int, block_k: int, rows: int, keys: int) -> Tensor:
    return grid.repeat_interleave(block_q, -2)[..., :rows, :].repeat_interleave(block_k, -1)[..., :keys]


class Site(nn.Module):
    def __init__(self, lists: tuple[Tensor, Tensor] | None, *how, **more):
        super().__init__()
        self.register_buffer("blocks", lists[0] if lists else None)
        self.register_buffer("counts", lists[1] if lists else None)
        self.how, self.more = how, more

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return sparse_attention(q, k, v, mask, self.blocks, self.counts, *self.how, **self.more)


def compiled(model: nn.Module, *inputs: Tensor) -> Tensor:
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(capture(model, inputs)).rounded()
    return TVMBackend().lower(program, "cpu").run(inputs)[0]


# ---------------------------------------------------------------------- the reference


def test_lists_and_masks_are_inverse() -> None:
    grid = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    assert torch.equal(block_mask(*block_lists(grid), 7), grid)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_masked_attention(causal: bool) -> None:
    q, k, v = (rand(2, 4, 50, 8, seed=i).double() for i in range(3))
    grid = torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    grid[..., 0] = True
    allowed = spread(grid, 16, 16, 50, 50)
    if causal:
        allowed = allowed & torch.ones(50, 50, dtype=torch.bool).tril()
    found = sparse_attention(q, k, v, None, *block_lists(grid), 16, 16, 0.3, causal)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, allowed, scale=0.3))


def test_reference_is_differentiable() -> None:
    q, k, v = (rand(1, 2, 12, 4, seed=i).double().requires_grad_() for i in range(3))
    lists = random_lists((1, 2, 3, 3), 1)
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, None, *lists, 4, 4, 0.5, False, 5.0), (q, k, v))


@given(st.floats(1.0, 12.0), st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_what_skipping_loses_is_bounded(skip: float, seed: int) -> None:
    q, k, v = (3 * rand(1, 2, 64, 8, seed=seed + i).double() for i in range(3))
    dense = F.scaled_dot_product_attention(q, k, v, scale=0.35)
    found = sparse_attention(q, k, v, None, None, None, 16, 16, 0.35, skip=skip)
    assert (found - dense).abs().max() <= 2 * 64 * math.exp(-skip) * v.abs().max()


# ---------------------------------------------------------------------- the kernel


@given(
    st.tuples(st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])),
    st.tuples(st.integers(16, 150), st.integers(1, 150)),
    st.sampled_from([8, 16, 20, 33, 64]),
    st.sampled_from([8, 24, 50, 64, 72]),
    st.sampled_from(["dense", "lists", "one list", "causal", "causal lists"]),
    st.sampled_from(["", "added", "boolean", "keys", "heads"]),
    st.sampled_from([None, 4.0]),
    st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_kernel_is_the_reference(batch_heads, lengths, width, out, kind, masked, softcap, seed) -> None:
    (batch, (heads, groups)), (rows, keys) = batch_heads, lengths
    q = rand(batch, heads, rows, width, seed=seed)
    k, v = rand(batch, groups, keys, width, seed=seed + 1), rand(batch, groups, keys, out, seed=seed + 2)
    lists = None
    if "list" in kind:
        lead = (1, 1) if kind == "one list" else (batch, heads)
        lists = random_lists((*lead, -(-rows // 32), -(-keys // 16)), seed)
    noise = rand(batch, heads, rows, keys, seed=seed + 3)
    mask = {
        "": None, "added": noise, "boolean": noise > -0.5, "keys": noise[:, :1, :1] > 0, "heads": noise[:1, :, :, :1],
    }[masked]  # fmt: skip
    site = Site(lists, 32, 16, 0.2, "causal" in kind, softcap)
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    assert not compare([site(*inputs)], [compiled(site, *inputs)]).exceeds(1e-5)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("skip", [0.5, 2.0, 6.0])
def test_kernel_skips_what_the_reference_skips(skip: float, wide: bool) -> None:
    """``wide``: in float64, found from the scores, as on targets without a kernel for it."""
    q, k, v = (2 * rand(1, 2, 100, 16, seed=i) for i in range(3))
    k = k * torch.linspace(2, 0.1, 100).reshape(100, 1)
    site = Site(None, 32, 16, 0.4, skip=skip)
    q, k, v = (t.double() if wide else t for t in (q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v, scale=0.4)
    wanted = site(q, k, v)
    assert compare([exact], [wanted]).exceeds(1e-4)
    assert not compare([wanted], [compiled(site, q, k, v)]).exceeds(1e-5)


def test_heads_inside_the_tokens_are_read_and_written_in_place() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.reshape(2, 40, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 40, 32)

    x = rand(2, 40, 96)
    assert not compare([Layer()(x)], [compiled(Layer(), x)]).exceeds(1e-5)


def test_other_types_are_composed() -> None:
    q, k, v = (rand(1, 2, 40, 8, seed=i).double() for i in range(3))
    site = Site(random_lists((1, 2, 2, 3), 5), 32, 16, 0.3, softcap=3.0)
    grid = block_mask(site.blocks, site.counts, 3)
    wanted, found = site(q, k, v), compiled(site, q, k, v)
    seen = grid.any(-1).repeat_interleave(32, -1)[
        ..., :40
    ]  # a row without keys is 0 in the reference, and composed the mean of all
    assert not compare([wanted[seen]], [found[seen]]).exceeds(1e-9)


def test_masked_blocks_are_not_read() -> None:
    """Infinities among the keys and values that no list names do not come out."""
    q, k, v = (rand(1, 1, 64, 16, seed=i) for i in range(3))
    k[:, :, 16:32], v[:, :, 16:32] = math.inf, math.nan
    lists = block_lists(torch.tensor([True, False, True, True]).expand(1, 1, 2, 4))
    found = compiled(Site(lists, 32, 16, 0.25), q, k, v)
    kept = [*range(16), *range(32, 64)]
    wanted = F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept], scale=0.25)
    assert not compare([wanted], [found]).exceeds(1e-5)


# ---------------------------------------------------------------------- selected blocks


class Selected(nn.Module):
    """Attention over blocks that are selected, and the lists as a mask."""

    def __init__(
        self,
        forced: Tensor,
        keep: Tensor,
        mass: Tensor,
        most: int,
        causal: bool,
        keys: Tensor | None = None,
        groups: Tensor | None = None,
    ):
        super().__init__()
        for name, value in (("forced", forced), ("keep", keep), ("mass", mass), ("keys", keys), ("groups", groups)):
            self.register_buffer(name, value)
        self.most, self.causal = most, causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how = (self.keys, self.forced, self.keep, self.mass, 32, 16, 0.5, self.most, self.causal, self.groups, 3)
        lists = torch.ops.thresher.select_blocks(q, k, *how)
        return sparse_attention(q, k, v, self.keys, *lists, 32, 16, 0.5, self.causal)


@given(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(33, 150), st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_selected_blocks_compile(causal: bool, masked: bool, wide: bool, grouped: bool, keys: int, seed: int) -> None:
    """``wide``: in float64, which no kernel of ours is for: what other targets get, too."""
    rows, (heads, groups) = 70, (4, 2)
    q = rand(2, heads, rows, 8, seed=seed)
    k, v = rand(2, groups, keys, 8, seed=seed + 1), rand(2, groups, keys, 16, seed=seed + 2)
    columns = -(-keys // 16)
    generator = torch.Generator().manual_seed(seed)
    forced = torch.rand(1, heads, 3, columns, generator=generator) < 0.1
    keep = torch.randint(0, columns, (heads,), generator=generator)
    mass = torch.tensor([2.0, 0.6, 0.9, 2.0])
    there = torch.rand(2, 1, 1, keys, generator=generator) < 0.7 if masked else None
    forced[..., 0] = True  # no row without a block
    if there is not None:
        there[..., 0] = True
    groups = torch.randint(0, -(-columns // 3) + 1, (heads,), generator=generator) if grouped else None
    model = Selected(forced, keep, mass, columns, causal, there, groups)
    q, k, v = (t.double() if wide else t for t in (q, k, v))
    assert not compare([model(q, k, v)], [compiled(model, q, k, v)]).exceeds(1e-5)


def test_selection_by_hand() -> None:
    """The fewest blocks with the mass, the forced one first, none that is masked or ahead."""
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([1.0, 3.0, 2.0, 9.0]).log().reshape(1, 1, 4, 1)
    none, keep = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.tensor([4])

    def chosen(forced=none, keep=keep, mass=2.0, keys=None, causal=False) -> list[list[int]]:
        select = torch.ops.thresher.select_blocks
        blocks, counts = select(q, k, keys, forced, keep, torch.tensor([mass]), 1, 1, 1.0, 4, causal)
        return [blocks[0, 0, i, : counts[0, 0, i]].tolist() for i in range(4)]

    first = none.clone()
    first[..., 0] = True
    assert chosen(keep=torch.tensor([2]))[0] == [1, 3]
    assert chosen(mass=0.6)[0] == [3] and chosen(mass=0.61)[0] == [1, 3]
    assert chosen(forced=first, keep=torch.tensor([2]))[0] == [0, 3]
    assert chosen(forced=first, keep=torch.tensor([0]))[0] == [0]
    assert chosen(keep=torch.tensor([2]), causal=True) == [[0], [0, 1], [1, 2], [1, 3]]
    assert chosen(keep=torch.tensor([1]), keys=torch.tensor([1, 1, 1, 0]).bool().reshape(1, 1, 1, 4))[3] == [1]


def test_groups_come_first() -> None:
    """The best block is not found if the mean of its group promises less, unless it is listed in any case."""
    q = torch.ones(1, 1, 1, 1)
    k = torch.tensor([5.0, 5.0, 9.0, 0.0, 1.0, 1.0]).reshape(1, 1, 6, 1)
    keep, mass, none = torch.tensor([2]), torch.tensor([2.0]), torch.zeros(1, 1, 1, 6, dtype=torch.bool)

    def chosen(groups: int | None, forced: Tensor = none) -> list[int]:
        best = None if groups is None else torch.tensor([groups])
        blocks, counts = torch.ops.thresher.select_blocks(q, k, None, forced, keep, mass, 1, 1, 1.0, 6, False, best, 2)
        return blocks[0, 0, 0, : counts[0, 0, 0]].tolist()

    ninth = none.clone()
    ninth[..., 2] = True
    assert chosen(None) == [0, 2] and chosen(1) == [0, 1] and chosen(2) == [0, 2] and chosen(1, ninth) == [0, 2]


class Pyramid(nn.Module):
    def __init__(self, lists: tuple[Tensor, Tensor], factor: int, columns: int):
        super().__init__()
        self.register_buffer("counts", lists[1])
        self.register_buffer("means", torch.tensor([True, False, True]))
        self.factor, self.columns = factor, columns

    def forward(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        lists = torch.ops.thresher.pyramid_lists(blocks, self.counts, self.means, self.factor, self.columns)
        there = torch.arange(lists[0].shape[-1]) < lists[1].unsqueeze(-1)
        return torch.where(there, lists[0], -1), lists[1]


@given(st.integers(2, 4), st.integers(1, 6), st.floats(0.0, 1.0), st.integers(0, 100))
@settings(max_examples=8, deadline=None)
def test_a_pyramid_sees_every_key_once(factor: int, groups: int, density: float, seed: int) -> None:
    columns = factor * groups
    lists = random_lists((2, 3, 4, groups), seed, density)
    blocks, counts = torch.ops.thresher.pyramid_lists(*lists, torch.tensor([True, False, True]), factor, columns)
    grid = block_mask(blocks, counts, columns + groups)
    fine, means = grid[..., :columns].unflatten(-1, (groups, factor)), grid[..., columns:]
    assert torch.equal(fine.all(-1), block_mask(*lists, groups)) and torch.equal(fine.any(-1), fine.all(-1))
    assert torch.equal(fine.any(-1)[:, ::2], ~means[:, ::2]) and not means[:, 1].any()
    model = Pyramid(lists, factor, columns)
    program = PassManager([*pipelines.exact], "off").run(capture(model, (lists[0],)))
    found = TVMBackend().lower(program, "cpu").run((lists[0],))
    assert all(torch.equal(a, b) for a, b in zip(model(lists[0]), found))


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -math.inf])
def test_rows_that_are_masked_altogether(low: float) -> None:
    """The least number leaves the softmax of a row uniform, as in eager mode; -inf leaves nothing."""
    q, k, v = (rand(1, 2, 40, 8, seed=i) for i in range(3))
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 5:7, :] = low
    mask[..., 9, 3:] = low
    site = Site(None, 64, 64, 0.3)
    wanted = v.mean(2) if low > -math.inf else torch.zeros(1, 2, 8)
    found = compiled(site, q, k, v, mask)
    assert not compare([wanted], [found[:, :, 5]]).exceeds(1e-5)
    assert not compare([site(q, k, v, mask)], [found]).exceeds(1e-5)


def test_heads_inside_tokens_are_written_once() -> None:
    """With a mask of truth values, of which TVM's own attention knows nothing: the result goes where its only user wants it."""

    def attention(q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask).transpose(1, 2).flatten(2)

    q, mask = torch.randn(1, 2, 24, 16), torch.rand(1, 1, 24, 24) > 0.3
    compiled = thresher.compile(Function(attention).eval(), (q, mask), target="cpu", verify="off")
    assert not compiled.report.library
    assert [k.name for k in compiled.executable.profile([q, mask]) if "transpose" in k.name] == []
    torch.testing.assert_close(compiled(q, mask), attention(q, mask), atol=1e-5, rtol=1e-5)
