"""Static patterns: the blocks of keys that each block of queries of a head always looks at.

Each is a boolean [H or 1, query blocks, key blocks] with a name. Some are shapes, for which the position of a token is enough:

    window           |i - j| <= w, in blocks                        (Longformer, Beltagy et al., 2020)
    sinks + window   the first block of keys, and a window          (StreamingLLM, Xiao et al., 2023; A-shape: MInference, 2024)
    dilated          every s-th block, and the diagonal             (strided: Sparse Transformer, Child et al., 2019)
    block-diagonal   groups of neighbours among themselves          (Swin's windows, in one dimension)
    cross            the tokens of the own row and column           (CCNet's mask, Huang et al., 2019, applied once; 2-D tokens only)
    neighbourhood    tokens at most r rows and columns away         (2-D tokens only)

others are made from what a head attended to on the calibration samples, as mean mass per block:

    stripes          the m key blocks with the most mass, and the diagonal          (vertical stripes: Sparse-vDiT, Chen et al., 2025)
    vertical-slash   the m key blocks and the m diagonals of blocks with the most mass        (after MInference, Jiang et al., 2024)
    mass t           per query block the fewest blocks that have t of the mass                (after SparseD, Wang et al., 2025)
    nothing          the head's output is 0                                                   (skipped heads: Sparse-vDiT)

Simplified: MInference finds stripes and slashes of each input from its last 64 queries, here they are those of the samples, in whole
blocks; SparseD keeps a fixed number of blocks per query block and follows the input from step to step, here a mass is kept, of the samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thresher.passes.attention._block_sizes import cover

WINDOWS = (0, 1, 2, 4, 8, 16)  # blocks on each side
DILATIONS = (2, 4)
GROUPS = (2, 4, 8)
RADII = (1, 2, 4)  # rows and columns
STRIPES = (1, 2, 4, 8)
MASSES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
PREFIXES = (0, 1, 2, 5)  # tokens before those of an image: class, distillation, registers


def static_patterns(mass: Tensor, rows: int, keys: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Return all patterns by name, for ``mass`` [H, query blocks, key blocks] of ``rows`` x ``keys`` tokens."""
    _, query_blocks, key_blocks = mass.shape
    patterns = shapes(query_blocks, key_blocks, block_q, block_k)
    if rows == keys and (grid := grid_of(rows)):
        patterns |= planes(*grid, block_q, block_k)
    return patterns | attended(mass, block_q, block_k)


def shapes(query_blocks: int, key_blocks: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Return the patterns that the position of a token decides alone."""
    i, j = (torch.arange(n) for n in (query_blocks, key_blocks))
    centre = (i * block_q + block_q // 2)[:, None] // block_k  # the key block at the middle of a query block
    distance = (centre - j).abs()
    reach = -(-block_q // (2 * block_k))  # of a query block itself
    patterns = {}
    for width in (width for width in WINDOWS if width + reach < key_blocks):
        window = distance <= width + reach - (block_q <= block_k)
        patterns[f"window of {width * block_k} tokens"] = window
        patterns[f"sinks and window of {width * block_k} tokens"] = window | (j == 0)
    for stride in DILATIONS:
        patterns[f"every {stride}. block"] = (distance % stride == 0) | (distance < reach)
    for group in (group for group in GROUPS if group * block_k <= key_blocks * block_k // 2):
        patterns[f"groups of {group * block_k} tokens"] = centre // group == j // group
    return {name: pattern[None] for name, pattern in patterns.items()}


def grid_of(tokens: int) -> tuple[int, int] | None:
    """Return (side, tokens before the image) where the tokens can be those of a square image, else None."""
    for prefix in PREFIXES:
        side = math.isqrt(tokens - prefix) if tokens > prefix else 0
        if side > 3 and side * side == tokens - prefix:
            return side, prefix
    return None


def planes(side: int, prefix: int, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Return the patterns of 2-D tokens; the ``prefix`` tokens before the image see and are seen by all."""
    token = torch.arange(side * side)
    dy = (token[:, None] // side - token // side).abs()
    dx = (token[:, None] % side - token % side).abs()
    near = {f"neighbourhood of {r} rows": torch.maximum(dy, dx) <= r for r in RADII if r < side // 2}
    patterns = {}
    for name, image in {"cross of row and column": (dy == 0) | (dx == 0), **near}.items():
        allowed = torch.ones(prefix + side * side, prefix + side * side, dtype=torch.bool)
        allowed[prefix:, prefix:] = image
        patterns[name] = cover(allowed[None], block_q, block_k)
    return patterns


def attended(mass: Tensor, block_q: int, block_k: int) -> dict[str, Tensor]:
    """Return the patterns made from the mean attention mass [H, query blocks, key blocks]."""
    heads, query_blocks, key_blocks = mass.shape
    i, j = (torch.arange(n) for n in (query_blocks, key_blocks))
    diagonal = ((i * block_q)[:, None] // block_k <= j) & (j <= (i * block_q + block_q - 1)[:, None] // block_k)
    patterns = {"nothing": torch.zeros_like(mass, dtype=torch.bool)}
    columns = mass.sum(1).argsort(dim=-1, descending=True, stable=True)
    slope = (j * block_k)[None, :] // block_q - i[:, None] + query_blocks  # the diagonal that a block lies on
    slashes = torch.zeros(heads, int(slope.max()) + 1, dtype=mass.dtype)
    slashes.scatter_add_(1, slope.reshape(1, -1).expand(heads, -1), mass.reshape(heads, -1))
    steepest = slashes.argsort(dim=-1, descending=True, stable=True)
    for count in (count for count in STRIPES if count < key_blocks):
        stripes = (columns[:, :count, None] == j).any(1)[:, None]
        slash = (steepest[:, :count, None, None] == slope).any(1)
        patterns[f"{count} stripes"] = stripes | diagonal
        patterns[f"{count} stripes and {count} slashes"] = stripes | slash
    fraction, order = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)).sort(dim=-1, descending=True, stable=True)
    for least_mass in MASSES:
        needed = fraction.cumsum(-1) - fraction < least_mass
        patterns[f"blocks with {100 * least_mass:g} % of the mass"] = torch.zeros_like(needed).scatter(
            -1, order, needed
        )
    return patterns
