"""Static patterns: which blocks of keys each block of queries of a head looks at, always.

Each is a boolean [H or 1, query blocks, key blocks] with a name. Some are shapes, for which the place of a token is enough:

    window           |i - j| <= w                                   (Longformer; Child et al., 2019, for the dilated one)
    sinks + window   the first keys, and a window                   (StreamingLLM, Xiao et al., 2023; A-shape: MInference, 2024)
    dilated          every s-th block, and the diagonal
    block-diagonal   groups of neighbours among themselves          (Swin's windows, in one dimension)
    cross            the tokens of the own row and column           (CCNet, Huang et al., 2019; 2-D tokens only)
    neighbourhood    tokens at most r rows and columns away         (2-D tokens only)

others are made from what a head attended to on the calibration samples, as mean mass per block:

    stripes          the m key blocks with the most mass, and the diagonal          (vertical stripes: Sparse-vDiT, Chen et al., 2025)
    vertical-slash   the m key blocks and the m diagonals with the most mass        (MInference, Jiang et al., 2024)
    mass t           per query block the fewest blocks that have t of the mass      (SparseD, Wang et al., 2025)
    nothing          the head's output is 0                                         (skipped heads: Sparse-vDiT)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WINDOWS = (0, 1, 2, 4, 8, 16)  # blocks on each side
DILATIONS = (2, 4)
GROUPS = (2, 4, 8)
RADII = (1, 2, 4)  # rows and columns
STRIPES = (1, 2, 4, 8)
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PREFIXES = (0, 1, 2, 5)  # tokens before those of an image: class, distillation, registers


def static_patterns(mass: Tensor, rows: int, keys: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """All patterns for ``mass`` [H, query blocks, key blocks] of ``rows`` x ``keys`` tokens."""
    _, query_blocks, key_blocks = mass.shape
    found = shapes(query_blocks, key_blocks, block_q, block_k)
    if rows == keys and (grid := grid_of(rows)):
        found |= planes(*grid, block_q, block_k)
    return found | attended(mass, block_q, block_k)


def shapes(query_blocks: int, key_blocks: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Patterns of the place of a token alone."""
    i, j = (torch.arange(n) for n in (query_blocks, key_blocks))
    centre = (i * block_q + block_q // 2)[:, None] // block_k  # the key block at the middle of a query block
    distance = (centre - j).abs()
    reach = -(-block_q // (2 * block_k))  # of a query block itself
    found = {}
    for w in (w for w in WINDOWS if w + reach < key_blocks):
        window = distance <= w + reach - (block_q <= block_k)
        found[f"window of {w * block_k} tokens"] = window
        found[f"sinks and window of {w * block_k} tokens"] = window | (j == 0)
    for s in DILATIONS:
        found[f"every {s}. block"] = (distance % s == 0) | (distance < reach)
    for g in (g for g in GROUPS if g * block_k <= key_blocks * block_k // 2):
        found[f"groups of {g * block_k} tokens"] = centre // g == j // g
    return {name: pattern[None] for name, pattern in found.items()}


def grid_of(tokens: int) -> tuple[int, int] | None:
    """(side, tokens before the image) where the tokens can be those of a square image."""
    for prefix in PREFIXES:
        side = math.isqrt(tokens - prefix) if tokens > prefix else 0
        if side > 3 and side * side == tokens - prefix:
            return side, prefix
    return None


def planes(side: int, prefix: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Patterns of 2-D tokens; those before the image see and are seen by all."""
    from thresher.passes.attention.skip_masked_blocks import cover

    place = torch.arange(side * side)
    dy = (place[:, None] // side - place // side).abs()
    dx = (place[:, None] % side - place % side).abs()
    near = {f"neighbourhood of {r} rows": torch.maximum(dy, dx) <= r for r in RADII if r < side // 2}
    found = {}
    for name, image in {"cross of row and column": (dy == 0) | (dx == 0), **near}.items():
        allowed = torch.ones(prefix + side * side, prefix + side * side, dtype=torch.bool)
        allowed[prefix:, prefix:] = image
        found[name] = cover(allowed[None], block_q, block_k)
    return found


def attended(mass: Tensor, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Patterns of the mean attention mass [H, query blocks, key blocks]."""
    heads, query_blocks, key_blocks = mass.shape
    i, j = (torch.arange(n) for n in (query_blocks, key_blocks))
    diagonal = ((i * block_q)[:, None] // block_k <= j) & (j <= (i * block_q + block_q - 1)[:, None] // block_k)
    found = {"nothing": torch.zeros_like(mass, dtype=torch.bool)}
    columns = mass.sum(1).argsort(dim=-1, descending=True, stable=True)
    slope = (j * block_k)[None, :] // block_q - i[:, None] + query_blocks  # the diagonal that a block lies on
    slashes = torch.zeros(heads, int(slope.max()) + 1, dtype=mass.dtype)
    slashes.scatter_add_(1, slope.reshape(1, -1).expand(heads, -1), mass.reshape(heads, -1))
    steepest = slashes.argsort(dim=-1, descending=True, stable=True)
    for m in (m for m in STRIPES if m < key_blocks):
        stripes = (columns[:, :m, None] == j).any(1)[:, None]
        slash = (steepest[:, :m, None, None] == slope).any(1)
        found[f"{m} stripes"] = stripes | diagonal
        found[f"{m} stripes and {m} slashes"] = stripes | slash
    share, order = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)).sort(dim=-1, descending=True, stable=True)
    for t in MASSES:
        enough = share.cumsum(-1) - share < t
        found[f"blocks with {100 * t:g} % of the mass"] = torch.zeros_like(enough).scatter(-1, order, enough)
    return found
