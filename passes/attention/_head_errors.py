"""What leaving out blocks of keys does to the output of every head, for many patterns at once.

With the weights A of full attention, the share of block j in row l is m_j = sum_{s in j} A_ls and its part of the output O_j = sum_{s in j}
A_ls v_s. Attention over a set J of blocks is then

    o_J = sum_{j in J} O_j / sum_{j in J} m_j

so that every pattern costs one small product over blocks, not an attention. Errors are measured behind the projection W of the site:
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
from thresher.passes.attention.pool_keys import Pooling, means_of_keys


@dataclass
class Sample:
    """One head of one sample: its shares [query blocks, block_q, key blocks], parts [.., key blocks, F] and output [.., F]."""

    shares: Tensor
    parts: Tensor
    output: Tensor

    def under(self, grids: Tensor) -> Tensor:
        """The outputs [C, query blocks, block_q, F] under boolean grids [C, query blocks, key blocks]."""
        on = grids.permute(1, 0, 2).to(self.parts.dtype)  # [query blocks, C, key blocks]
        rows, size, columns, width = self.parts.shape
        total = on @ self.parts.permute(0, 2, 1, 3).reshape(rows, columns, size * width)
        share = on @ self.shares.permute(0, 2, 1)
        mixed = total.unflatten(2, (size, width)) / share.clamp(min=1e-30).unsqueeze(-1)
        return mixed.permute(1, 0, 2, 3)


def each_head(
    site: AttentionSite,
    values: dict[Any, Any],
    blocks: Blocks,
    use: Callable[[int, int, Sample], None],
    pooling: Pooling | None = None,
) -> None:
    """Call ``use(batch, head, sample)`` for every head, with the values that a run gave the site. With ``pooling`` blocks of means of keys
    follow those of the keys themselves; a mean weighs as much as the keys that it stands for."""
    q, k, v = (values[n].float() for n in (site.q, site.k, site.v))
    mask = None if site.mask is None else values[site.mask]
    batch, heads, rows, keys = site.shape
    group = heads // k.shape[1]
    below = torch.ones(rows, keys, dtype=torch.bool).tril() if site.causal else None
    coarse = None if pooling is None else [t.float() for t in means_of_keys(site, values, pooling)]
    for b in range(batch):
        for h in range(heads):
            scores = (q[b, h] * site.scale) @ k[b, h // group].mT
            if mask is not None:
                own = mask.expand(batch, heads, rows, keys)[b, h]
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype is torch.bool else scores + own
            if below is not None:
                scores = scores.masked_fill(~below, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            sample = _cut((scores - total).exp().nan_to_num(), v[b, h // group], blocks)
            if coarse is not None:
                means, mixed, bias = coarse
                weights = ((q[b, h] * site.scale) @ means[b, h // group].mT + bias[b, 0] - total).exp().nan_to_num()
                more = _cut(weights, mixed[b, h // group], blocks)
                shares, parts = torch.cat([sample.shares, more.shares], -1), torch.cat([sample.parts, more.parts], 2)
                sample = Sample(shares, parts, sample.output)
            use(b, h, sample)


def _cut(weights: Tensor, v: Tensor, blocks: Blocks) -> Sample:
    pad = (0, -weights.shape[1] % blocks.k, 0, -weights.shape[0] % blocks.q)
    tiles = torch.nn.functional.pad(weights, pad).unflatten(1, (-1, blocks.k)).unflatten(0, (-1, blocks.q))
    values = torch.nn.functional.pad(v, (0, 0, 0, pad[1])).unflatten(0, (-1, blocks.k))
    parts = torch.einsum("iqjk,jkf->iqjf", tiles, values)
    return Sample(tiles.sum(-1), parts, parts.sum(2))


@dataclass
class HeadErrors:
    """Sums over samples for one site, by pattern and head: squared errors, and blocks that were listed."""

    weights: Tensor  # [H, F, F], of errors behind the projection
    norm: float = 0.0
    outputs: int = 0  # samples, each of a batch counted
    sums: dict[str, Tensor] = field(default_factory=dict)
    listed: dict[str, Tensor] = field(default_factory=dict)

    def add(self, head: int, sample: Sample, grids: dict[str, Tensor]) -> None:
        """Of grids [query blocks, key blocks] for one head of one sample."""
        names, weight = list(grids), self.weights[head].to(sample.output.dtype)
        off = sample.under(torch.stack(list(grids.values()))) - sample.output
        found = torch.einsum("ciqf,fg,ciqg->c", off, weight, off).double()
        for name, error in zip(names, found):
            for known, value in ((self.sums, error), (self.listed, grids[name].sum())):
                known.setdefault(name, torch.zeros(len(self.weights), dtype=torch.float64))[head] += value

    def add_output(self, outputs: Tensor) -> None:
        """The squared norm of the outputs of all heads, [B, H, L, F]; heads are taken as independent."""
        self.outputs += outputs.shape[0]
        output = outputs.transpose(0, 1).flatten(1, 2)
        weight = self.weights.to(output.dtype)
        self.norm += float(torch.einsum("hlf,hfg,hlg->", output, weight, output))

    def relative(self) -> dict[str, Tensor]:
        """Squared errors relative to the site's whole output."""
        return {name: total.clamp(min=0) / max(self.norm, 1e-30) for name, total in self.sums.items()}
