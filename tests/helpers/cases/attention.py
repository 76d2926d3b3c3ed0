"""Cases of the attention passes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.attention import Layers, sequences
from helpers.cases.contexts import calibrated
from helpers.masked_attention import Masked, band, qkv
from helpers.modules import Function
from thresher.testing import Case, Entry


def banded(rows: int) -> tuple[nn.Module, tuple]:
    return Masked(band(rows, rows, 8)), qkv(rows, rows)


def layers(count: int, tokens: int = 64) -> tuple[nn.Module, tuple]:
    return Layers(count), (sequences(1, tokens, 4)[0],)


def peaked(tokens: int) -> tuple[nn.Module, tuple]:
    """Every token looks at those like it, which lie together."""

    def attend(x: Tensor) -> Tensor:
        q = 3 * x.reshape(1, tokens, 2, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(1, tokens, 16)

    return Function(attend), (sequences(1, tokens, tokens // 2)[0],)


def masked_layers(tokens: int) -> tuple[nn.Module, tuple]:
    return Layers(1), (sequences(1, tokens, 4)[0], torch.arange(tokens)[None] < tokens - 8)


FIRST = ("simplify",)
BUDGET = calibrated(0.5, noise=0.2)

CASES = {
    "skip-masked-blocks": [Entry(Case("band", banded, rows=(96, 130)), first=FIRST)],
    "share-attention": [Entry(Case("layers", layers, count=(2,), tokens=(32,)), first=FIRST, context=BUDGET)],
    "pool-values": [Entry(Case("masked", masked_layers, tokens=(20, 24)), first=FIRST, context=BUDGET)],
    "pool-keys": [Entry(Case("masked", masked_layers, tokens=(64,)), first=FIRST, context=BUDGET)],
    "sparse-attention": [
        Entry(Case("layer", layers, count=(1,), tokens=(64,)), "{block=16}", FIRST, BUDGET),
    ],
    "pyramid-attention": [
        Entry(Case("layer", layers, count=(1,), tokens=(128,)), "{block=16}", FIRST, BUDGET),
    ],
    "skip-small-weights": [Entry(Case("peaked", peaked, tokens=(64,)), "", FIRST, BUDGET)],
}
