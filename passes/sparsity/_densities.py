"""The zeros that the linear layers of a program meet, on samples: at their inputs, and in what their outputs are multiplied with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from thresher.analysis.cost.break_even import MAX_MEMORY_BOUND_ROWS, Kind
from thresher.approximation.calibration import watch
from thresher.ir.nodes import is_tensor, shape_of
from thresher.ir.program import Program
from thresher.passes.sparsity._linear_layers import layers_of_constants

aten = torch.ops.aten
TILE_ROWS = 7  # that share a list, where there are many rows


@dataclass(frozen=True)
class Site:
    """A linear layer whose zeros could be skipped: of its input, or of the ``gate`` that its output is multiplied with in ``product``."""

    kind: Kind
    linear: fx.Node
    gate: fx.Node | None = None
    product: fx.Node | None = None

    @property
    def sparse(self) -> fx.Node:
        """The value that has the zeros."""
        return self.linear.args[0] if self.gate is None else self.gate

    @property
    def rows(self) -> int:
        """The number of rows that the layer multiplies."""
        return math.prod(int(d) for d in shape_of(self.linear)[:-1])


@dataclass(frozen=True)
class Density:
    """The fraction of all elements that are ``nonzero``, and of the columns that are ``listed``: not 0 in some row of a tile."""

    nonzero: float
    listed: float


def sites_of(program: Program, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> list[Site]:
    """Return the sites of layers with constant, finite weights and static shapes; a gated layer has two, one for its input."""
    sites = []
    for node in layers_of_constants(program, dtypes):
        sites.append(Site("input", node))
        product = next(iter(node.users)) if len(node.users) == 1 else None
        if product is not None and product.target is aten.mul.Tensor:
            gate = product.args[1] if product.args[0] is node else product.args[0]
            if is_tensor(gate) and shape_of(gate) == shape_of(node) and gate < node:
                sites.append(Site("gate", node, gate, product))
    return sites


def densities(program: Program, sites: Sequence[Site], samples: Sequence[list[Any]]) -> dict[Site, Density]:
    """Return the density of each site, the mean over the samples."""
    sums = {s: [0.0, 0.0] for s in sites}
    by_node: dict[fx.Node, list[Site]] = {}
    for site in sites:
        by_node.setdefault(site.linear if site.product is None else site.product, []).append(site)

    def see(node: fx.Node, values: dict[fx.Node, Any]) -> None:
        for site in by_node[node]:
            x = values[site.sparse]
            sums[site][0] += float((x != 0).double().mean()) / len(samples)
            sums[site][1] += listed(x) / len(samples)

    watch(program, samples, {node: partial(see, node) for node in by_node})
    return {site: Density(*values) for site, values in sums.items()}


def listed(x: Tensor) -> float:
    """Return the fraction of the columns of x [.., K] that are not 0 in some row of a tile; the mean over the tiles."""
    rows = (x != 0).flatten(0, -2)
    tile = len(rows) if len(rows) <= MAX_MEMORY_BOUND_ROWS else TILE_ROWS
    rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % tile))
    return float(rows.unflatten(0, (-1, tile)).any(1).double().mean())
