"""How a site is cut into blocks of queries and keys, as the kernels of a target want it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thresher.analysis.attention.sites import AttentionSite
from thresher.ir.nodes import dtype_of, shape_of

SHORTEST = 64  # queries and keys from which on blocks can be left out


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block."""

    q: int
    k: int

    def rows(self, site: AttentionSite) -> int:
        return -(-site.shape[2] // self.q)

    def columns(self, site: AttentionSite) -> int:
        return -(-site.shape[3] // self.k)


def blocks_of(site: AttentionSite, target: str, size: int = 0) -> Blocks:
    """Of ``size`` tokens; 0: by the length. GPUs take 64 queries at a time."""
    size = size or (32 if min(site.shape[2:]) <= 1024 and not target.startswith("cuda") else 64)
    return Blocks(size, size)


def tiles_of(site: AttentionSite, target: str) -> Blocks:
    """What is decided on at once where blocks are left out by their weights."""
    if not target.startswith("cuda"):
        return Blocks(32, 32)
    return Blocks(64, 64 if max(shape_of(n)[3] for n in (site.q, site.v)) <= 64 else 32)


def cannot_skip(site: AttentionSite, target: str) -> str:
    """Why leaving out blocks saves nothing at a site, or empty."""
    _, _, rows, keys = site.shape
    if min(rows, keys) < SHORTEST:
        return f"{rows} queries and {keys} keys are too few"
    if target.startswith("cuda") and dtype_of(site.q) not in (torch.float16, torch.bfloat16):
        return "GPUs leave out blocks in half precision only"
    return ""
