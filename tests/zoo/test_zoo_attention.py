"""Every attention of untouched models is found, however it is spelled, or named with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import thresher
import thresher.ops
from helpers.architectures import build
from helpers.transformer_models import TEXT, THERE, TOKENS, transformers
from thresher.analysis.attention.sites import SOFTMAX, attention_sites
from thresher.analysis.attention.summary import describe_attentions
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import EXACT_TOLERANCE, compare

CAPPED = torch.ops.thresher.sparse_attention.default


def zoo(library: str, name: str) -> Callable[[], tuple[nn.Module, tuple]]:
    return lambda: build(library, name)


WHISPER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 200, "max_source_positions": 100, "pad_token_id": 0,
}  # fmt: skip
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 200}

#: model -> how to build it, and how many attentions it has
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple]], int]] = {
    **{
        f"timm {name}": (zoo("timm", name), count)
        for name, count in {
            "vit_tiny_patch16_224": 12, "swin_tiny_patch4_window7_224": 12, "xcit_nano_12_p16_224": 14, "pvt_v2_b0": 8,
            "crossvit_tiny_240": 21, "levit_128s": 11, "efficientvit_m0": 24, "visformer_tiny": 8,
        }.items()
    },
    "BERT": (transformers("BertModel", (TOKENS, THERE), **TEXT), 2),
    "BERT, eager": (transformers("BertModel", (TOKENS, THERE), "eager", **TEXT), 2),
    "DistilBERT, eager": (
        transformers("DistilBertModel", (TOKENS, THERE), "eager", dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=200), 2
    ),
    "GPT-2, eager": (
        transformers("GPT2Model", (TOKENS,), "eager", n_embd=64, n_layer=2, n_head=4, vocab_size=200, use_cache=False), 2
    ),
    "Llama": (transformers("LlamaModel", (TOKENS,), num_key_value_heads=2, use_cache=False, **TEXT), 2),
    "Llama, eager": (transformers("LlamaModel", (TOKENS, THERE), "eager", num_key_value_heads=2, use_cache=False, **TEXT), 2),
    "Gemma 2, capped": (
        transformers("Gemma2Model", (TOKENS, THERE), "eager", num_key_value_heads=2, head_dim=16, use_cache=False, **TEXT), 2
    ),
    "T5 encoder": (transformers("T5EncoderModel", (TOKENS, THERE), **T5), 2),
    "CLIP text, eager": (transformers("CLIPTextModel", (TOKENS, THERE), "eager", **TEXT), 2),
    "Whisper encoder": (transformers("WhisperModel", (torch.randn(1, 80, 200),), pick="get_encoder", **WHISPER), 2),
    "BLOOM": (zoo("transformers", "Bloom"), 2),
    "DeBERTa": (zoo("transformers", "DebertaV2"), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_found(name: str) -> None:
    make, count = MODELS[name]
    model, args = make()
    program = capture(model, args)
    manager = PassManager(pipelines.canonicalize, "off")
    result = manager.run(program)
    assert [r.failure for r in manager.records if r.status == "reverted"] == []
    sites, others = attention_sites(result)
    assert len(sites) + len(others) + len(list(result.calls(CAPPED))) == count
    assert not list(result.calls(*SOFTMAX)), "a softmax that is no attention, in models that have no other"
    before, after = (p.run(*program.probe, dtype=torch.float64) for p in (program, result))
    assert not compare(before, after).exceeds(EXACT_TOLERANCE)


def test_talking_heads_are_named_and_their_neighbours_found() -> None:
    """CaiT mixes the weights of its heads in 24 layers; the two class attention layers are plain."""
    program = capture(*zoo("timm", "cait_xxs24_224")())
    manager = PassManager(pipelines.canonicalize, "off")
    result = manager.run(program)
    refused = next(r for r in manager.records if r.name == "canonicalize-attention").refusals
    assert len(attention_sites(result)[0]) == 2
    assert len(refused) == 24 and all("talking heads" in n.message for n in refused)


class HiLo(nn.Module):
    """LITv2's attention as its authors wrote it: heads over windows of 2 x 2, and heads over averages of them (Pan et al., 2022)."""

    def __init__(self, dim: int = 32, heads: int = 4, window: int = 2):
        super().__init__()
        self.half, self.width, self.window = heads // 2, dim // heads, window
        inner = self.half * self.width
        self.h_qkv, self.h_proj = nn.Linear(dim, 3 * inner), nn.Linear(inner, inner)
        self.l_q, self.l_kv, self.l_proj = nn.Linear(dim, inner), nn.Linear(dim, 2 * inner), nn.Linear(inner, inner)
        self.pool = nn.AvgPool2d(window, window)

    def high(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        s, rows, columns = self.window, h // self.window, w // self.window
        x = x.reshape(b, rows, s, columns, s, c).transpose(2, 3)
        qkv = self.h_qkv(x).reshape(b, rows * columns, -1, 3, self.half, self.width).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv[0], qkv[1], qkv[2]
        y = ((q @ k.transpose(-2, -1)) * self.width**-0.5).softmax(-1) @ v
        y = y.transpose(2, 3).reshape(b, rows, columns, s, s, -1).transpose(2, 3).reshape(b, h, w, -1)
        return self.h_proj(y)

    def low(self, x: torch.Tensor) -> torch.Tensor:
        b, h, w, c = x.shape
        q = self.l_q(x).reshape(b, h * w, self.half, self.width).permute(0, 2, 1, 3)
        pooled = self.pool(x.permute(0, 3, 1, 2)).reshape(b, c, -1).permute(0, 2, 1)
        kv = self.l_kv(pooled).reshape(b, -1, 2, self.half, self.width).permute(2, 0, 3, 1, 4)
        y = ((q @ kv[0].transpose(-2, -1)) * self.width**-0.5).softmax(-1) @ kv[1]
        return self.l_proj(y.transpose(1, 2).reshape(b, h, w, -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.high(x), self.low(x)], -1)


KINDS = {
    "HiLo": (lambda: (HiLo().eval(), (torch.randn(1, 8, 8, 32),)), {"pooled keys (by avg_pool2d)": 1, "16 windows": 1}),
    "PVT v2": (zoo("timm", "pvt_v2_b0"), {"pooled keys (by a strided convolution)": 6}),
    "Swin": (zoo("timm", "swin_tiny_patch4_window7_224"), {"64 windows": 2, "16 windows": 2, "4 windows": 6}),
    "PoolFormer": (zoo("timm", "poolformer_s12"), {"pooling instead of attention": 12}),
    "XCiT": (zoo("timm", "xcit_nano_12_p16_224"), {"channels": 12}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_that_models_were_trained_with_are_named(name: str) -> None:
    make, wanted = KINDS[name]
    program = PassManager(pipelines.canonicalize, "off").run(capture(*make()))
    words = [line.partition(":")[0] for _, line in describe_attentions(program)]
    assert {w: words.count(w) for w in wanted} == wanted


def test_a_trained_variant_compiles_exactly() -> None:
    model, x = HiLo().eval(), torch.randn(1, 8, 8, 32)
    report = thresher.compile(model, (x,)).report
    assert all(c.passed for c in report.checks) and [w for w, *_ in (line.split(":") for _, line in report.attention)]
