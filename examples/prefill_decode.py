"""A language model in one artifact: ``prefill`` reads the prompt, ``decode`` adds a token at a time. They share their weights.

The cache of keys and values goes in and comes out. It has the room of ``LENGTH`` tokens from the beginning,
so that every shape is known when the code is made.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from thresher.models.llama import Llama, rotate

PROMPT, LENGTH = 16, 32


class Cached(nn.Module):
    """Token ids [1, N] at ``place`` [N], and the cache [2, depth, 1, kv_heads, LENGTH, width] -> the last logits and the cache."""

    def __init__(self, model: Llama):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, place: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        frequency = 10000.0 ** (-torch.arange(0, model.width, 2, dtype=torch.float32) / model.width)
        angle = torch.cat([place[:, None] * frequency] * 2, -1)
        seen = torch.arange(LENGTH) <= place[:, None]  # a token sees those at its place and before
        x, layers = model.embed(ids), []
        for block, keys, values in zip(model.blocks, cache[0], cache[1]):
            normed = block.norm1(x)
            q, k, v = (
                projection(normed).view(1, ids.shape[1], -1, block.width).transpose(1, 2)
                for projection in (block.q_proj, block.k_proj, block.v_proj)
            )
            q, k = (rotate(t, angle.cos(), angle.sin()) for t in (q, k))
            keys, values = keys.index_copy(2, place, k), values.index_copy(2, place, v)
            layers.append((keys, values))
            groups = block.heads // block.kv_heads
            k, v = (t.repeat_interleave(groups, 1) for t in (keys, values))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            x = x + block.o_proj(y.transpose(1, 2).reshape(1, ids.shape[1], -1))
            y = block.norm2(x)
            x = x + block.down_proj(F.silu(block.gate_proj(y)) * block.up_proj(y))
        new = torch.stack([torch.stack(side) for side in zip(*layers)])
        return model.head(model.norm(x[:, -1])), new


def main(folder: str) -> None:
    torch.manual_seed(0)
    llama = Llama().eval()
    model = Cached(llama).eval()
    block = llama.blocks[0]
    cache = torch.zeros(2, len(llama.blocks), 1, block.kv_heads, LENGTH, block.width)
    prompt = torch.randint(0, 1024, (1, PROMPT))

    # two builds of one model, for two shapes; the second packs its weights as the first does
    prefill = thresher.compile(model, (prompt, torch.arange(PROMPT), cache))
    decode = thresher.compile(model, (prompt[:, :1], torch.tensor([PROMPT]), cache), share=prefill)
    alone = sum(m.save(Path(folder) / "alone.thresher").stat().st_size for m in (prefill, decode))
    path = thresher.Bundle({"prefill": prefill, "decode": decode}).save(Path(folder) / "llama.thresher")
    print(f"{path.stat().st_size / 1e6:.1f} MB together, {alone / 1e6:.1f} MB as two artifacts")

    # elsewhere: no model code
    loaded = thresher.load(path)
    logits, cache = loaded["prefill"](prompt, torch.arange(PROMPT), cache)
    ids = prompt
    for place in range(PROMPT, LENGTH):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        logits, cache = loaded["decode"](ids[:, -1:], torch.tensor([place]), cache)

    # what the model says to the whole text at once, without a cache
    wanted = llama(ids)[0, PROMPT - 1 :].argmax(-1)
    said = [*ids[0, PROMPT:].tolist(), logits.argmax().item()]
    assert said == wanted.tolist(), (said, wanted.tolist())
    print(f"{len(said)} tokens, the same as the model says without a cache: {said}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
