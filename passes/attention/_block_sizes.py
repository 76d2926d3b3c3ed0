"""Blocks of queries and keys: the sizes that the kernels of a target take, and what they cover."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of

MIN_TOKENS = 64  # queries and keys from which on blocks can be left out


@dataclass(frozen=True)
class Blocks:
    """The queries ``q`` and keys ``k`` of a block."""

    q: int
    k: int

    def rows(self, site: AttentionSite) -> int:
        """Return the number of blocks of queries."""
        return -(-site.shape[2] // self.q)

    def columns(self, site: AttentionSite) -> int:
        """Return the number of blocks of keys."""
        return -(-site.shape[3] // self.k)


def blocks_of(site: AttentionSite, target: str, size: int = 0) -> Blocks:
    """Return blocks of ``size`` tokens; 0: by the length of the site. GPUs take 64 queries at a time."""
    size = size or (32 if min(site.shape[2:]) <= 1024 and not target.startswith("cuda") else 64)
    return Blocks(size, size)


def tiles_of(site: AttentionSite, target: str) -> Blocks:
    """Return the blocks that a kernel leaves out by their weights."""
    if not target.startswith("cuda"):
        return Blocks(32, 32)
    return Blocks(64, 64 if max(shape_of(n)[3] for n in (site.q, site.v)) <= 64 else 32)


def cannot_skip(site: AttentionSite, target: str) -> str:
    """Return why leaving out blocks saves nothing at a site, or an empty string."""
    _, _, rows, keys = site.shape
    if min(rows, keys) < MIN_TOKENS:
        return f"{rows} queries and {keys} keys are too few, blocks are left out from {MIN_TOKENS} on"
    if target.startswith("cuda") and dtype_of(site.q) not in (torch.float16, torch.bfloat16):
        return "GPUs leave out blocks in half precision only: convert the model with .half() or .bfloat16()"
    return ""


def cover(allowed: Tensor, block_q: int, block_k: int) -> Tensor:
    """Return which blocks hold something that is ``allowed``: boolean [.., L, S] to [.., query blocks, key blocks]."""
    pad = (0, -allowed.shape[-1] % block_k, 0, -allowed.shape[-2] % block_q)
    padded = torch.nn.functional.pad(allowed, pad)
    return padded.unflatten(-1, (-1, block_k)).any(-1).unflatten(-2, (-1, block_q)).any(-2)
