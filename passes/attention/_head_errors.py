"""What leaving out blocks of keys does to the output of every head, for many patterns at once.

With the weights A of full attention, the mass of block j in row l is m_j = sum_{s in j} A_ls and its summand of the output is
O_j = sum_{s in j} A_ls v_s. Attention over a set J of blocks is then

    o_J = sum_{j in J} O_j / sum_{j in J} m_j

so that every pattern costs one small product over blocks, not an attention. Errors are measured after the projection W of the site:
|(o_J - o) W_h|^2, over |o W|^2 of all heads together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thresher.analysis.attention.sites import AttentionSite
from thresher.passes.attention._block_sizes import Blocks
from thresher.passes.attention._pooling import Pooling, means_of_keys


@dataclass
class Sample:
    """One head of one sample: its mass [query blocks, block_q, key blocks], summands [.., key blocks, F] and output [.., F]."""

    mass: Tensor
    summands: Tensor
    output: Tensor

    def under(self, grids: Tensor) -> Tensor:
        """Return the outputs [C, query blocks, block_q, F] under boolean grids [C, query blocks, key blocks]."""
        listed = grids.permute(1, 0, 2).to(self.summands.dtype)  # [query blocks, C, key blocks]
        rows, size, columns, width = self.summands.shape
        total = listed @ self.summands.permute(0, 2, 1, 3).reshape(rows, columns, size * width)
        mass = listed @ self.mass.permute(0, 2, 1)
        mixed = total.unflatten(2, (size, width)) / mass.clamp(min=1e-30).unsqueeze(-1)
        return mixed.permute(1, 0, 2, 3)


def each_head(
    site: AttentionSite,
    values: dict[Any, Any],
    blocks: Blocks,
    use: Callable[[int, int, Sample], None],
    pooling: Pooling | None = None,
) -> None:
    """Call ``use(batch, head, sample)`` for every head, with the values that a run gave the site.

    With ``pooling``, blocks of means of keys follow those of the keys themselves; a mean weighs as much as the keys that it stands for.
    """
    q, k, v = (values[n].float() for n in (site.q, site.k, site.v))
    mask = None if site.mask is None else values[site.mask]
    batch, heads, rows, keys = site.shape
    heads_per_key = heads // k.shape[1]
    allowed = torch.ones(rows, keys, dtype=torch.bool).tril() if site.causal else None
    means_of_site = None if pooling is None else [t.float() for t in means_of_keys(site, values, pooling)]
    for b in range(batch):
        for h in range(heads):
            scores = (q[b, h] * site.scale) @ k[b, h // heads_per_key].mT
            if mask is not None:
                head_mask = mask.expand(batch, heads, rows, keys)[b, h]
                scores = (
                    scores.masked_fill(~head_mask, -torch.inf) if head_mask.dtype is torch.bool else scores + head_mask
                )
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            sample = _cut((scores - total).exp().nan_to_num(), v[b, h // heads_per_key], blocks)
            if means_of_site is not None:
                k_means, v_means, bias = means_of_site
                weights = (
                    ((q[b, h] * site.scale) @ k_means[b, h // heads_per_key].mT + bias[b, 0] - total).exp().nan_to_num()
                )
                coarse = _cut(weights, v_means[b, h // heads_per_key], blocks)
                mass, summands = (
                    torch.cat([sample.mass, coarse.mass], -1),
                    torch.cat([sample.summands, coarse.summands], 2),
                )
                sample = Sample(mass, summands, sample.output)
            use(b, h, sample)


def _cut(weights: Tensor, v: Tensor, blocks: Blocks) -> Sample:
    pad = (0, -weights.shape[1] % blocks.k, 0, -weights.shape[0] % blocks.q)
    tiles = torch.nn.functional.pad(weights, pad).unflatten(1, (-1, blocks.k)).unflatten(0, (-1, blocks.q))
    values = torch.nn.functional.pad(v, (0, 0, 0, pad[1])).unflatten(0, (-1, blocks.k))
    summands = torch.einsum("iqjk,jkf->iqjf", tiles, values)
    return Sample(tiles.sum(-1), summands, summands.sum(2))


@dataclass
class HeadErrors:
    """Sums over samples for one site, by pattern and head: squared errors, and blocks that were listed."""

    weights: Tensor  # [H, F, F], of errors after the projection
    norm: float = 0.0
    outputs: int = 0  # samples, each of a batch counted
    sums: dict[str, Tensor] = field(default_factory=dict)
    listed: dict[str, Tensor] = field(default_factory=dict)

    def add(self, head: int, sample: Sample, grids: dict[str, Tensor]) -> None:
        """Add the errors under grids [query blocks, key blocks], by name, for one head of one sample."""
        names, weight = list(grids), self.weights[head].to(sample.output.dtype)
        difference = sample.under(torch.stack(list(grids.values()))) - sample.output
        errors = torch.einsum("ciqf,fg,ciqg->c", difference, weight, difference).double()
        for name, error in zip(names, errors):
            for sums, value in ((self.sums, error), (self.listed, grids[name].sum())):
                sums.setdefault(name, torch.zeros(len(self.weights), dtype=torch.float64))[head] += value

    def add_output(self, outputs: Tensor) -> None:
        """Add the squared norm of the outputs of all heads, [B, H, L, F]; heads are taken as independent."""
        self.outputs += outputs.shape[0]
        output = outputs.transpose(0, 1).flatten(1, 2)
        weight = self.weights.to(output.dtype)
        self.norm += float(torch.einsum("hlf,hfg,hlg->", output, weight, output))

    def relative(self) -> dict[str, Tensor]:
        """Return the squared errors [H] of each pattern relative to the site's whole output."""
        return {name: total.clamp(min=0) / max(self.norm, 1e-30) for name, total in self.sums.items()}
