"""Fewer tokens from layer to layer: that streams are found, what is resized and what is restored, and what a reduction of nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thresher
import thresher.ops
from helpers.cases.contexts import calibrated
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from helpers.sites import site
from thresher import Budget
from thresher.approximation.calibration import Calibration
from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.folded_module import to_module
from thresher.ir.nodes import shape_of
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.models.vit import ViT
from thresher.passes import pipelines
from thresher.passes.tokens._by_position import describe_positions, error_by_position, kept_by_position
from thresher.passes.tokens._importance import SIDES
from thresher.passes.tokens._streams import read_by_position, streams
from thresher.passes.tokens.reduce_tokens import ReduceTokens
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

ops = torch.ops.thresher


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(size=32, patch=4, dim=32, depth=3, heads=2, classes=5).eval()  # 64 tokens and the class token


def images(count: int, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def smooth(count: int) -> list[Tensor]:
    """Images whose neighbouring patches are alike."""
    coarse = torch.randn(count, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return [nn.functional.interpolate(x, size=(32, 32)) for x in coarse]


def folded(model: nn.Module, *inputs: Tensor) -> Program:
    return PassManager(pipelines.exact).run(capture(model, inputs))


def edited(
    program: Program, counts: dict[int, int], kind: str = "merge", rule: ReduceTokens | None = None
) -> tuple[Program, list[str]]:
    """``program`` with so many tokens gone behind each attention."""
    work, blockers = program.clone(), []
    for number, count in counts.items():
        blockers += (rule or ReduceTokens()).reduce(work, streams(work)[0][number].value.name, kind, count)
    return work.clean().verify(), blockers


def test_the_streams_of_a_vit() -> None:
    found, refusals = streams(program := folded(vit(), images(1)[0]))
    assert [s.tokens for s in found] == [65, 65, 65] and not refusals
    assert read_by_position(program) == 1


@pytest.mark.parametrize("kind", sorted(SIDES))
def test_tokens_go_from_layer_to_layer(kind: str) -> None:
    x = images(1)[0]
    program = folded(vit(), x)
    work, blockers = edited(program, {0: 20, 1: 10}, kind)
    lengths = [shape_of(n)[2] for n in work.calls(torch.ops.aten.scaled_dot_product_attention.default)]
    assert lengths == [65, 45, 35] and blockers == []
    assert work.run(x)[0].shape == (1, 5)
    masks = [n.kwargs.get("attn_mask") for n in work.calls(torch.ops.aten.scaled_dot_product_attention.default)]
    assert masks[0] is None and [shape_of(m)[-1] for m in masks[1:]] == [45, 35]


def test_equal_tokens_merge_exactly() -> None:
    """Tokens that are the same in pairs stand for one another: proportional attention makes the merged model the same function."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()
            with torch.no_grad():
                self.vit.position[:] = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x)

    torch.manual_seed(3)
    patches = torch.randn(1, 3, 8, 4, 4, 4)  # eight columns of patches are made of four
    twice = patches.repeat_interleave(2, 3).reshape(1, 3, 8, 8, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 32, 32)
    program = folded(Twins(), twice)
    work, _ = edited(program, {0: 32})
    assert compare(program.run(twice), work.run(twice)).relative < 1e-5
    other = images(1)[0]
    assert compare(program.run(other), work.run(other)).relative > 1e-3


class Encoder(nn.Module):
    """Post-norm with a mask of keys, all tokens as output or their mean."""

    def __init__(self, pooled: bool):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2))
        self.pooled = pooled

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        mask = there[:, None, None]
        for layer in self.layers:
            h = layer.self_attn
            q, k, v = (
                nn.functional.linear(x, h.in_proj_weight, h.in_proj_bias)
                .reshape(*x.shape[:2], 3, 2, 8)
                .permute(2, 0, 3, 1, 4)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = layer.norm1(x + h.out_proj(y.transpose(1, 2).reshape(x.shape)))
            x = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
        if not self.pooled:
            return x
        weight = there[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("pooled", [False, True])
def test_padding_goes_first_and_all_tokens_come_back(pooled: bool) -> None:
    x, there = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 40, dtype=torch.bool)
    there[:, 24:] = False
    model = Encoder(pooled).eval()
    program = folded(model, x, there)
    work, blockers = edited(program, {0: 16}, "received", ReduceTokens(drop=True))
    assert len(blockers) == 1 and ("output" in blockers[0]) != pooled
    before, after = program.run(x, there)[0], work.run(x, there)[0]
    assert after.shape == before.shape
    seen = slice(None) if pooled else there
    assert compare([before[seen]], [after[seen]]).relative < 1e-5  # only padding went


class Rotary(nn.Module):
    """Two layers with rotary positions for all but the first ``prefix`` tokens, as timm's EVA and DINOv3 have them."""

    def __init__(self, tokens: int, prefix: int):
        super().__init__()
        torch.manual_seed(0)
        self.prefix, self.maps = prefix, nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        angle = torch.arange(tokens - prefix).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat_interleave(2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def rotate(self, x: Tensor) -> Tensor:
        first, rest = x[:, :, : self.prefix], x[:, :, self.prefix :]
        turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).reshape(rest.shape)
        rest = rest * self.cos + turned * self.sin
        return torch.cat([first, rest], 2) if self.prefix else rest

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        for qkv in self.maps:
            q, k, v = qkv(x).reshape(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            q, k, mask = self.rotate(q), self.rotate(k), there[:, None, None]
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = x + y.transpose(1, 2).reshape(x.shape)
        return x


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rotary_positions_go_with_their_tokens(prefix: int, drop: bool) -> None:
    """Only padding goes, from between the others: all that is left stays as it is, if every token keeps its position."""
    x = torch.randn(2, 48, 16, generator=torch.Generator().manual_seed(0))
    there = (torch.arange(48) % 3 != 1).expand(2, -1) | (torch.arange(48) < prefix)
    there = there | (torch.arange(2).unsqueeze(1) * torch.arange(48) > 40)  # another number of them in each sample
    program = folded(Rotary(48, prefix).eval(), x, there)
    gone = int((~there).sum(1).min())
    work, blockers = edited(program, {0: gone}, "received", ReduceTokens(drop=drop))
    assert len(blockers) == 1 and "output" in blockers[0]
    assert [shape_of(n)[2] for n in work.calls(torch.ops.aten.scaled_dot_product_attention.default)] == [48, 48 - gone]
    before, after = program.run(x, there)[0], work.run(x, there)[0]
    assert compare([before[there]], [after[there]]).relative < 1e-5
    compiled = thresher.compile(to_module(work), (x, there), passes="none")
    assert not compare([after], [compiled(x, there)]).exceeds(1e-5)


def test_what_mixes_neighbours_gets_all_tokens() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.conv = vit(), nn.Conv1d(32, 32, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            v = self.inner
            x = torch.cat([v.token.expand(1, -1, -1), v.embed(x).flatten(2).transpose(1, 2)], 1) + v.position
            x = v.blocks[0](x)
            x = x + self.conv(x.mT).mT
            return v.head(v.norm(v.blocks[1](x))[:, 0])

    _, blockers = edited(folded(Mixed(), images(1)[0]), {0: 20})
    assert any("conv1d" in b for b in blockers)


def test_causal_attention_is_refused() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.reshape(1, 32, 2, 8).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            return x + y.transpose(1, 2).reshape(1, 32, 16)

    found, refusals = streams(folded(Causal(), torch.randn(1, 32, 16)))
    assert not found and "causal, or its mask differs from query to query" in refusals[0].message


def test_within_the_budget() -> None:
    data = smooth(16)
    program = folded(vit(), data[0])
    calibration = Calibration.of(program, data, Budget(rel_l2=0.05))
    manager = PassManager([ReduceTokens(kinds="merge+energy+received")])
    result = manager.run(program, Context(calibration=calibration))
    assert manager.records[0].status == "changed" and manager.ledger[0].held_out.bound <= 0.05
    assert any("tokens" in words and "by their position" in words for words in manager.ledger[0].checks)
    compiled = thresher.compile(to_module(result), (data[0],), passes="none")
    assert not compare(result.run(data[1]), [compiled(data[1])]).exceeds(1e-4)


def test_what_stays_of_every_place() -> None:
    """Padding at the end goes in two reductions; what is left of each place is told, and where the error is."""
    x, there = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 40, dtype=torch.bool)
    there[0, 30:] = there[1, 20:] = False
    program = folded(Encoder(False).eval(), x, there)
    work, _ = edited(program, {0: 6, 1: 4}, "received", ReduceTokens(drop=True))
    kept = kept_by_position(work, [[x, there]])
    assert kept[:20].tolist() == [1.0] * 20 and kept[20:].tolist() == [0.5] * 20
    calibration = Calibration.of(program, [(x, there)] * 8, Budget(rel_l2=0.5))
    errors = error_by_position(work, calibration, calibration.held_out_samples, 40)
    assert errors is not None and errors[:20].max() < 1e-5 and errors.max() > 0.1  # what is dropped is 0
    assert [
        w.startswith(("of 40 tokens 75 % are left", "error by position")) for w in describe_positions(work, calibration)
    ] == [True] * 2


def test_unknown_scores() -> None:
    with pytest.raises(PassError, match="some of merge, energy, received, pagerank, joined by plus signs, not 'best'"):
        ReduceTokens(kinds="best")


def test_a_reduced_model_can_be_trained() -> None:
    work, _ = edited(folded(vit(), images(1)[0]), {0: 20})
    module = to_module(work)
    module(images(1)[0]).square().sum().backward()
    grads = [p.grad for p in module.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads) and len(grads) > 10


BEFORE = """\
program model {
  %x = input : f32[1, 32, 8]
  %weight = constant "weight" : f32[512, 8]
  %heads = aten.reshape.default(%x, [1, 32, 2, 4]) : f32[1, 32, 2, 4]
  %q = aten.permute.default(%heads, [0, 2, 1, 3]) : f32[1, 2, 32, 4]
  %site = aten.scaled_dot_product_attention.default(%q, %q, %q) : f32[1, 2, 32, 4]
  %tokens = aten.permute.default(%site, [0, 2, 1, 3]) : f32[1, 32, 2, 4]
  %flat = aten.reshape.default(%tokens, [1, 32, 8]) : f32[1, 32, 8]
  %sum = aten.add.Tensor(%x, %flat) : f32[1, 32, 8]
  %linear = aten.linear.default(%sum, %weight) : f32[1, 32, 512]
  %y = aten.select.int(%linear, 1, 0) : f32[1, 512]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[1, 32, 8]
  %weight = constant "weight" : f32[512, 8]
  %token_sizes = constant "token_sizes" : f32[1, 32]
  %heads = aten.reshape.default(%x, [1, 32, 2, 4]) : f32[1, 32, 2, 4]
  %q = aten.permute.default(%heads, [0, 2, 1, 3]) : f32[1, 2, 32, 4]
  %site = aten.scaled_dot_product_attention.default(%q, %q, %q) : f32[1, 2, 32, 4]
  %tokens = aten.permute.default(%site, [0, 2, 1, 3]) : f32[1, 32, 2, 4]
  %flat = aten.reshape.default(%tokens, [1, 32, 8]) : f32[1, 32, 8]
  %sum_1 = aten.add.Tensor(%x, %flat) : f32[1, 32, 8]
  %mean = aten.mean.dim(%q, [1]) : f32[1, 32, 4]
  %linalg_vector_norm = aten.linalg_vector_norm.default(%mean, 2, [-1], True) : f32[1, 32, 1]
  %clamp = aten.clamp.default(%linalg_vector_norm, 1e-12) : f32[1, 32, 1]
  %div = aten.div.Tensor(%mean, %clamp) : f32[1, 32, 4]
  %permute = aten.permute.default(%div, [0, 2, 1]) : f32[1, 4, 32]
  %matmul = aten.matmul.default(%div, %permute) : f32[1, 32, 32]
  %token_sides = thresher.token_sides.default(%token_sizes, %token_sizes, 'alternate', 15, 1, 0) : i64[1, 32]
  %match_tokens = thresher.match_tokens.default(%matmul, %token_sizes, %token_sides, 15, False) : (i64[1, 32], f32[1, 17], f32[1, 32])
  %getitem = getitem(%match_tokens, 0) : i64[1, 32]
  %reduce_tokens = thresher.reduce_tokens.default(%sum_1, %token_sizes, %getitem, 17) : f32[1, 17, 8]
  %linear = aten.linear.default(%reduce_tokens, %weight) : f32[1, 17, 512]
  %y = aten.select.int(%linear, 1, 0) : f32[1, 512]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("reduce-tokens{kinds=merge}", BEFORE, AFTER, context=calibrated(10.0))


def behind(*lines: str, batch: int = 1, channels: int = 8, tokens: int = 32, shared: int = 2) -> Build:
    """Lines that read %sum, the residual sum behind an attention without a mask; the last one defines %y, or returns."""
    n, t, c, e = batch, tokens, channels, channels // 2
    head = f"""
        %x = input : f32[{n}, {t}, {c}]
        %heads = aten.reshape.default(%x, [{n}, {t}, 2, {e}]) : f32[{n}, {t}, 2, {e}]
        %q = aten.permute.default(%heads, [0, 2, 1, 3]) : f32[{n}, 2, {t}, {e}]
        %key = aten.slice.Tensor(%q, 1, 0, {shared}) : f32[{n}, {shared}, {t}, {e}]
        %site = aten.scaled_dot_product_attention.default(%q, %key, %key, enable_gqa=True) : f32[{n}, 2, {t}, {e}]
        %mixed = aten.permute.default(%site, [0, 2, 1, 3]) : f32[{n}, {t}, 2, {e}]
        %flat = aten.reshape.default(%mixed, [{n}, {t}, {c}]) : f32[{n}, {t}, {c}]
        %sum = aten.add.Tensor(%x, %flat) : f32[{n}, {t}, {c}]"""
    constants = [line for line in lines if " = constant " in line]
    rest = [line for line in lines if line not in constants]
    end = [] if rest and rest[-1].startswith("return") else ["return [%y]"]
    return lambda: parse("\n".join([*constants, head, *rest, *end]))


def attended(arguments: str, *constants: str) -> Build:
    """A second attention, whose queries %h are made from the residual sum."""
    return behind(
        *constants,
        "%split = aten.reshape.default(%sum, [1, 32, 2, 4]) : f32[1, 32, 2, 4]",
        "%h = aten.permute.default(%split, [0, 2, 1, 3]) : f32[1, 2, 32, 4]",
        f"%y = aten.scaled_dot_product_attention.default({arguments}) : f32[1, 2, 32, 4]",
    )


def cut(rows: int = 32, keys: int = 32, rest: str = "", after: str = "aten.add.Tensor(%q, %site)") -> Build:
    """An attention, and what is made of it."""
    return lambda: parse(
        f"""
        %q = input : f32[1, 2, {rows}, 4]
        %k = input : f32[1, 2, {keys}, 4]
        %site = aten.scaled_dot_product_attention.default(%q, %k, %k{rest}) : f32[1, 2, {rows}, 4]
        %y = {after} : f32[1, 2, {rows}, 4]
        return [%y]"""
    )


OTHERS = '%k = constant "k" : f32[1, 2, 32, 4]'
REFUSALS = [
    ("its tokens cannot become fewer: *", cut(keys=20)),
    ("queries and keys are different tokens", cut(keys=20)),
    ("causal, or its mask differs from query to query", cut(rest=", None, 0.0, True")),
    ("no residual sum follows it", lambda: site(32, 32)),
    ("* stands between it and the residual sum", cut(after="aten.exp.default(%site)")),
    ("the residual sum is not [batch, tokens, channels] in float32", cut()),
    ("fewer tokens (*) save nothing here: *", behind("return [%sum]")),
    (
        "matching costs as much as the layers after it save",
        behind(
            '%w = constant "w" : f32[8, 8]',
            "%l = aten.linear.default(%sum, %w) : f32[1, 32, 8]",
            "%y = aten.select.int(%l, 1, 0) : f32[1, 8]",
        ),
    ),
    ("* tokens are too few", behind("return [%sum]", tokens=12)),
    ("groups of query heads share its keys", behind("return [%sum]", shared=1)),
    ("an output of the model", behind("return [%sum]")),
    (
        "values of another length",
        behind(
            "%t = aten.permute.default(%sum, [0, 2, 1]) : f32[1, 32, 32]",
            "%y = aten.add.Tensor(%sum, %t) : f32[1, 32, 32]",
            channels=32,
        ),
    ),
    (
        "tokens in more than one dimension",
        behind(
            "%a = aten.unsqueeze.default(%sum, 1) : f32[1, 1, 32, 8]",
            "%b = aten.unsqueeze.default(%sum, 2) : f32[1, 32, 1, 8]",
            "%y = aten.mul.Tensor(%a, %b) : f32[1, 32, 32, 8]",
        ),
    ),
    (
        "values of different tokens",
        behind(
            "%r = aten.slice.Tensor(%sum, 1, 1, 9223372036854775807) : f32[1, 31, 8]",
            "%a = aten.unsqueeze.default(%r, 1) : f32[1, 1, 31, 8]",
            "%b = aten.unsqueeze.default(%sum, 1) : f32[1, 1, 32, 8]",
            "%y = aten.scaled_dot_product_attention.default(%a, %b, %b) : f32[1, 1, 31, 8]",
        ),
    ),
    (
        "numbers that differ from sample to sample or head to head belong to positions",
        behind('%c = constant "c" : f32[2, 32, 8]', "%y = aten.mul.Tensor(%sum, %c) : f32[2, 32, 8]", batch=2),
    ),
    (
        "attention over another dimension than tokens",
        behind(
            "%h = aten.reshape.default(%sum, [1, 32, 2, 4]) : f32[1, 32, 2, 4]",
            "%y = aten.scaled_dot_product_attention.default(%h, %h, %h) : f32[1, 32, 2, 4]",
        ),
    ),
    ("causal attention: a token that stands for several has no position", attended("%h, %h, %h, None, 0.0, True")),
    ("keys and values of different tokens", attended("%h, %h, %k", OTHERS)),
    ("a mask with a row for every token", attended("%h, %k, %k, %m", OTHERS, '%m = constant "m" : f32[1, 1, 32, 32]')),
    (
        "another mask than that of the first reduction",
        attended("%h, %h, %h, %m", '%m = constant "m" : f32[1, 1, 1, 32]'),
    ),
    ("tokens are regrouped", behind("%y = aten.reshape.default(%sum, [1, 256]) : f32[1, 256]")),
    ("token * by its position", behind("%y = aten.select.int(%sum, 1, 9) : f32[1, 8]")),
    ("tokens by their position", behind("%y = aten.slice.Tensor(%sum, 1, 9, 12) : f32[1, 3, 8]")),
    (
        "channels are mixed with tokens",
        behind(
            '%w = constant "w" : f32[5, 32]',
            "%t = aten.permute.default(%sum, [0, 2, 1]) : f32[1, 8, 32]",
            "%y = aten.linear.default(%t, %w) : f32[1, 8, 5]",
        ),
    ),
    (
        "tokens are joined with others",
        behind('%c = constant "c" : f32[1, 3, 8]', "%y = aten.cat.default([%c, %sum], 1) : f32[1, 35, 8]"),
    ),
    ("a sum over all tokens", behind("%y = aten.mean.dim(%sum, [1]) : f32[1, 8]")),
    (
        "*: *, and batch and tokens are one dimension there",
        behind("%t = aten.permute.default(%sum, [1, 0, 2]) : f32[32, 1, 8]", "%y = aten.mean.dim(%t, [0]) : f32[1, 8]"),
    ),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    item = "reduce-tokens{kinds=received}" if sentence == "groups of query heads share its keys" else "reduce-tokens"
    check_refusal(item, sentence, build, context=calibrated(10.0))
