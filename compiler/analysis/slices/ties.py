"""Indices that must go together: ties between dimensions of values, and the largest cut that respects them all.

A *key* is one dimension of one value, ``(node, dim)``, or a virtual one such as ``(node, "group")``. ``keep[key]`` is a boolean vector.
Ties only ever *add* kept indices, so the fixed point is unique: the most that can be cut.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx

Key = tuple[fx.Node, int | str]


@dataclass(eq=False)
class Tie:
    """A relation between dimensions: index ``j`` of the product space of ``right`` is index ``index[j]`` of the product space of ``left``.

    A plain equality of two dimensions is the case of one key on each side and ``index = arange``. A ``view`` that splits channels
    into heads has one key on the left and two on the right; what is kept must then be a product set on both sides.
    """

    node: fx.Node  # the operator that makes the tie
    left: tuple[Key, ...]
    right: tuple[Key, ...]
    left_sizes: tuple[int, ...]
    right_sizes: tuple[int, ...]
    index: Tensor  # int64, shape right_sizes

    @property
    def keys(self) -> tuple[Key, ...]:
        """All keys of both sides."""
        return self.left + self.right

    @property
    def joins(self) -> bool:
        """True if the two sides belong to one coupled set."""
        return True

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        """Grow ``keep`` in place until both sides agree; return the keys that grew."""
        left = _outer([keep[k] for k in self.left], self.left_sizes).reshape(-1)
        both = _outer([keep[k] for k in self.right], self.right_sizes) | left[self.index]
        grown = _grow(keep, self.right, both)
        back = torch.zeros(max(1, math.prod(self.left_sizes)), dtype=torch.bool)
        back[self.index[both]] = True
        return grown + _grow(keep, self.left, back.reshape(self.left_sizes))


class Equal(Tie):
    """A tie of two dimensions that keep the same indices. The operator treats all indices alike: both may be permuted."""

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        a, b = self.left[0], self.right[0]
        one, other = keep[a], keep[b]
        if one is other or torch.equal(one, other):
            return []
        both = one | other
        grown = [key for key, vector in ((a, one), (b, other)) if not torch.equal(both, vector)]
        keep[a] = keep[b] = both
        return grown


def equal(node: fx.Node, a: Key, b: Key, size: int) -> Tie:
    """Return the tie of two dimensions of ``size`` that keep the same indices."""
    return Equal(node, (a,), (b,), (size,), (size,), torch.arange(size))


class Ordered(Equal):
    """A tie of two dimensions that keep the same indices in the same order, as in the groups of a norm."""


class Independent(Tie):
    """A tie that asks for nothing: the operator can cut its two dimensions each for itself."""

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        return []

    @property
    def joins(self) -> bool:
        return False


def ordered(node: fx.Node, a: Key, b: Key, size: int) -> Tie:
    """Return the tie of two dimensions of ``size`` that keep the same indices and must not be permuted."""
    return Ordered(node, (a,), (b,), (size,), (size,), torch.arange(size))


def independent(node: fx.Node, a: Key, b: Key, size: int) -> Tie:
    """Return the tie of two dimensions of ``size`` that do not depend on each other and may both be cut."""
    return Independent(node, (a,), (b,), (size,), (size,), torch.empty(0, dtype=torch.long))


class Balanced(Tie):
    """A tie of the inputs and outputs of a grouped convolution: every group that stays keeps as many indices as every other.

    The weight is packed anew, group by group, so positions need not agree; counts must. A group whose inputs and outputs are all
    cut goes as a whole. Where a group has too few, its first dead indices stay.
    """

    def close(self, keep: dict[Key, Tensor]) -> list[Key]:
        sides = [(self.left[0], self.left_sizes), (self.right[0], self.right_sizes)]
        live = torch.zeros(self.left_sizes[0], dtype=torch.bool)
        for key, shape in sides:
            live |= keep[key].reshape(shape).any(1)
        grown = []
        for key, shape in sides:
            kept = keep[key].reshape(shape)
            wanted = max(int(kept.sum(1).max()), int(live.any()))
            if bool((kept.sum(1)[live] < wanted).any()):
                first = (
                    kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :wanted]
                )  # kept ones come first
                full = torch.zeros_like(kept).scatter_(1, first, live[:, None].expand_as(first))
                keep[key] = (kept | full).reshape(-1)
                grown.append(key)
        return grown


def balanced(node: fx.Node, inputs: Key, outputs: Key, in_sizes: tuple[int, int], out_sizes: tuple[int, int]) -> Tie:
    """Return the tie of a grouped convolution's inputs and outputs.

    ``in_sizes`` are (groups, inputs per group), ``out_sizes`` (groups, outputs per group).
    """
    return Balanced(node, (inputs,), (outputs,), in_sizes, out_sizes, torch.empty(0, dtype=torch.long))


def split(node: fx.Node, whole: Key, parts: Sequence[Key], part_sizes: Sequence[int]) -> Tie:
    """Return the tie of ``whole`` to ``parts``, of which it is the row-major product; ``part_sizes`` are the sizes of the parts."""
    total = math.prod(part_sizes)
    return Tie(
        node, (whole,), tuple(parts), (total,), tuple(part_sizes), torch.arange(total).reshape(tuple(part_sizes))
    )


def _outer(vectors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    result = torch.ones(shape, dtype=torch.bool)
    for dim, vector in enumerate(vectors):
        result = result & vector.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return result


def _grow(keep: dict[Key, Tensor], keys: tuple[Key, ...], wanted: Tensor) -> list[Key]:
    grown = []
    for dim, key in enumerate(keys):
        others = [d for d in range(wanted.dim()) if d != dim]
        need = wanted.any(others) if others else wanted
        if bool((need & ~keep[key]).any()):
            keep[key] = keep[key] | need
            grown.append(key)
    return grown


def close_all(
    ties: list[Tie], keep: dict[Key, Tensor], holders: dict[Key, fx.Node], first: list[Tie] | None = None
) -> None:
    """Grow ``keep`` in place to the fixed point of all ties. ``first``: those that may not be closed yet (default: all).

    ``holders`` gets, for each key that grew, the operator at the root of it: the one that already holds a neighbour, or else the one whose
    tie asked for it.
    """
    incident: dict[Key, list[Tie]] = {}
    for tie in ties:
        for key in tie.keys:
            incident.setdefault(key, []).append(tie)
    queue = deque(ties if first is None else first)
    queued = set(queue)
    while queue:
        tie = queue.popleft()
        queued.discard(tie)
        grown = tie.close(keep)
        root = next((holders[k] for k in tie.keys if k in holders and k not in grown), tie.node)
        for key in grown:
            holders[key] = root
            for other in incident[key]:
                if other not in queued:
                    queued.add(other)
                    queue.append(other)


def coupling_graph(ties: Iterable[Tie]) -> nx.Graph:
    """Return the coupled sets as an inspectable graph.

    Vertices are ``(node name, dim)``, edges carry the name of the operator that ties them; ``networkx.connected_components`` gives the
    sets.
    """
    graph = nx.Graph()
    for tie in ties:
        names = [(node.name, dim) for node, dim in tie.keys]
        graph.add_nodes_from(names)
        graph.add_edges_from((names[0], other, {"operator": tie.node.name}) for other in names[1:])
    return graph
