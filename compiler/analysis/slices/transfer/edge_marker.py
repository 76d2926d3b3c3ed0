"""A marker on an edge, whose two sides may keep different indices of one dimension.

The fold puts it where a tie would keep dead indices: before the operator that holds them, or before one that does not read what others
read. What is kept on its two sides is not tied along ``dim``; afterwards it becomes a gather, a padding, or nothing. It never leaves the
pass.
"""

from __future__ import annotations

from torch import Tensor, fx

from thresher.analysis.slices.facts import Known, reduce_to, sizes
from thresher.analysis.slices.ties import Tie, equal, independent
from thresher.analysis.slices.transfer.base import Facts, TransferRule


def edge_marker(x: Tensor, dim: int) -> Tensor:
    """Return ``x``; the call marks dimension ``dim`` of an edge."""
    return x


class EdgeMarker(TransferRule):
    """The rule of the marker: the identity, whose two sides are independent along its dimension."""

    supported = True

    def forward(self, node: fx.Node, facts: Facts) -> Known | None:
        return facts.get(node.args[0])

    def backward(self, node: fx.Node, wanted: Tensor, facts: Facts) -> dict[fx.Node, Tensor]:
        return {node.args[0]: reduce_to(wanted, sizes(node))}

    def constraints(self, node: fx.Node, facts: Facts) -> list[Tie]:
        """Tie every dimension but the marked one."""
        source, open_dim = node.args
        pairs = [((node, d), (source, d), s) for d, s in enumerate(sizes(node))]
        return [(independent if d == open_dim else equal)(node, *pair) for d, pair in enumerate(pairs)]
