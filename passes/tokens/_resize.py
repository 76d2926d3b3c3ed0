"""What stands behind a value with fewer tokens is made for fewer tokens; where something needs all of them, they are restored first.

Tokens are treated as a set by pointwise operators, by linear layers and norms over channels, and by attention, to whose scores log(size)
is added. Those take fewer tokens as they are, once the sizes in their arguments are right. Numbers that belong to places (rotary positions)
become those of the tokens whose slots they are. Tokens at the front may stand apart for a while. Whatever treats tokens otherwise
(convolutions, scans, means and softmax over tokens, sums with values of another length, outputs) gets every token back, as
``restore_tokens``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.attention.sites import SDPA, SOFTMAX
from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program

aten, ops = torch.ops.aten, torch.ops.thresher
MOVES = (aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
NORMS = (aten.layer_norm.default, aten.rms_norm.default, ops.layer_norm.default)


class NeedsAllTokens(Exception):
    """Why an operator does not take fewer tokens."""


@dataclass
class Resize:
    """One reduction: ``source`` [B, N, C] became ``reduced`` [B, N - r, C] by ``assign``; ``sizes`` [B, N - r] of the slots say what the
    ``mask`` of keys said before, ``own`` [B, N] whose slots they are. ``protected`` tokens at the front are where they were.

    ``dims``: the dimension of tokens of what has fewer; ``starts``: how many at the front it is without. ``blockers`` are those who needed
    all tokens."""

    program: Program
    source: fx.Node
    reduced: fx.Node
    assign: fx.Node
    sizes: fx.Node
    own: fx.Node
    mask: fx.Node | None
    protected: int
    dims: dict[fx.Node, int] = field(default_factory=dict)
    starts: dict[fx.Node, int] = field(default_factory=dict)
    blockers: list[str] = field(default_factory=list)
    _whole: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _placed: dict[tuple[fx.Node, int, int], fx.Node] = field(default_factory=dict)
    _apart: dict[int, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    _bias: fx.Node | None = None

    def run(self) -> None:
        """Let everything behind ``source`` read ``reduced``."""
        behind = [n for n in self.program.graph.nodes if n > self.reduced]
        for user in [u for u in self.source.users if u > self.reduced]:
            user.replace_input_with(self.source, self.reduced)
        self.dims[self.reduced], self.starts[self.reduced] = 1, 0
        for node in behind:
            if not any(n in self.dims for n in node.all_input_nodes):
                continue
            if node.op == "output":
                self.restore(node, "an output of the model")
            else:
                self.take(node)

    def take(self, node: fx.Node) -> None:
        """Make ``node`` for fewer tokens, or restore them before it."""
        old_args, old_kwargs, old_value = node.args, node.kwargs, node.meta["val"]
        try:
            start = self.fit(node)
            self.program.refresh(node)
            self.dims.update(self.changed(node, old_value))
            self.starts[node] = start
        except (NeedsAllTokens, RuntimeError, ValueError, IndexError, TypeError) as reason:
            node.args, node.kwargs, node.meta["val"] = old_args, old_kwargs, old_value
            self.restore(node, str(reason) if isinstance(reason, NeedsAllTokens) else "values of another length")

    def changed(self, node: fx.Node, before: Any) -> dict[fx.Node, int]:
        """The token dimension of the result: the one whose size changed."""
        if not isinstance(before, torch.Tensor):
            raise NeedsAllTokens("several results")
        dims = [d for d, (a, b) in enumerate(zip(before.shape, shape_of(node))) if a != b]
        if len(before.shape) != len(shape_of(node)) or len(dims) > 1:
            raise NeedsAllTokens("tokens in more than one dimension")
        return {node: dims[0]} if dims else {}

    # ------------------------------------------------------------------ what takes fewer tokens

    def fit(self, node: fx.Node) -> int:
        """Make the arguments of ``node`` right; returns how many tokens at the front the result is without."""
        target = node.target
        if target is aten.slice.Tensor:
            return self.slice(node)
        if target is aten.cat.default:
            return self.concat(node)
        starts = {self.starts[n] for n in node.all_input_nodes if n in self.dims}
        if len(starts) > 1:
            raise NeedsAllTokens("values of different tokens")
        if target is SDPA:
            self.attention(node)
        elif target in (aten.reshape.default, aten.expand.default):
            self.sizes_of(node)
        elif target is aten.select.int:
            self.select(node)
        elif target is aten.linear.default or target in NORMS:
            self.channels(node)
        elif target in SOFTMAX or target in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default):
            self.over_other_dims(node)
        elif _pointwise(node):
            self.pointwise(node)
        elif target not in MOVES:
            raise NeedsAllTokens(str(target).removesuffix(".default"))
        return starts.pop()

    def pointwise(self, node: fx.Node) -> None:
        """What belongs to places goes with the tokens."""
        rank = max(len(shape_of(n)) for n in node.all_input_nodes)
        x = next(n for n in node.all_input_nodes if n in self.dims)
        behind = len(shape_of(x)) - self.dims[x]  # the dimension of the tokens, from the last one
        for other in node.all_input_nodes:
            shape = shape_of(other)
            if other not in self.dims and len(shape) >= behind and shape[-behind] == self.before(x):
                node.replace_input_with(other, self.placed(other, self.starts[x], len(shape) - behind, rank - behind))
        torch.broadcast_shapes(*(shape_of(n) for n in node.all_input_nodes))

    def before(self, x: fx.Node) -> int:
        """How many tokens ``x`` had."""
        return shape_of(self.source)[1] - self.starts[x]

    def placed(self, x: fx.Node, start: int, dim: int, to: int) -> fx.Node:
        """[.., 1, N - start, *rest], the tokens at ``dim``, as [B, .., 1, N' - start, *rest] with the tokens at ``to``: of every slot the
        numbers of the token whose slot it is."""
        if (x, start, to) in self._placed:
            return self._placed[x, start, to]
        if to < 1 or any(d != 1 for d in shape_of(x)[:dim]):
            raise NeedsAllTokens("numbers that differ from sample to sample or head to head belong to places")
        tokens, rest, batch = shape_of(x)[dim], shape_of(x)[dim + 1 :], shape_of(self.source)[0]
        own, assign = self.apart(start)
        place = x if x > self.reduced else assign if start else self.reduced

        def call(target: Any, *args: Any) -> fx.Node:
            nonlocal place
            place = self.program.insert_call(place.next, target, args, like=x)
            return place

        flat = call(aten.reshape.default, x, [1, tokens, math.prod(rest)])
        flat = call(aten.expand.default, flat, [batch, tokens, math.prod(rest)])
        left = shape_of(self.reduced)[1] - start
        taken = call(ops.reduce_tokens.default, flat, own, assign, left)
        self._placed[x, start, to] = call(aten.reshape.default, taken, [batch, *[1] * (to - 1), left, *rest])
        return self._placed[x, start, to]

    def apart(self, start: int) -> tuple[fx.Node, fx.Node]:
        """``own`` and ``assign`` without the first tokens."""
        if start and start not in self._apart:
            place, end = self.reduced.next, shape_of(self.source)[1]

            def call(target: Any, *args: Any) -> fx.Node:
                return self.program.insert_call(place, target, args, like=self.reduced)

            own, assign = (call(aten.slice.Tensor, n, 1, start, end) for n in (self.own, self.assign))
            lower = call(aten.sub.Tensor, assign, start)
            self._apart[start] = own, call(aten.clamp.default, lower, -1)
        return self._apart[start] if start else (self.own, self.assign)

    def attention(self, node: fx.Node) -> None:
        q, k, v = node.args[:3]
        rank = len(shape_of(q))
        if any(self.dims.get(n, rank - 2) != rank - 2 for n in (q, k, v)):
            raise NeedsAllTokens("attention over another dimension than tokens")
        if argument(node, 5, "is_causal", False):
            raise NeedsAllTokens("causal attention: a token that stands for several has no place")
        mask = argument(node, 3, "attn_mask")
        if (k in self.dims) != (v in self.dims):
            raise NeedsAllTokens("keys and values of different tokens")
        if k not in self.dims:
            if mask is not None and shape_of(mask)[-2:-1] not in ((), (1,)):
                raise NeedsAllTokens("a mask with a row for every token")
            return
        if mask is not self.mask:
            raise NeedsAllTokens("another mask than that of the first reduction")
        node.args = node.args[:3]
        node.kwargs = {**{n: a for n, a in node.kwargs.items() if n != "attn_mask"}, "attn_mask": self.bias(rank)}

    def bias(self, rank: int) -> fx.Node:
        """log(size) of the keys, [B, 1, 1, N - r]; -inf for padding."""
        if self._bias is None:
            batch, tokens = shape_of(self.sizes)
            with_origin = dict(like=self.reduced)
            place = self.reduced.next
            log = self.program.insert_call(place, aten.log.default, (self.sizes,), **with_origin)
            shape = [batch, *[1] * (rank - 2), tokens]
            self._bias = self.program.insert_call(place, aten.reshape.default, (log, shape), **with_origin)
        return self._bias

    def sizes_of(self, node: fx.Node) -> None:
        """New sizes in the arguments of reshape and expand."""
        source, sizes = node.args[:2]
        dim, before = self.dims[source], shape_of(node)
        now = shape_of(source)[dim]
        old = self.before(source)
        if node.target is aten.expand.default:
            at = dim + len(before) - len(shape_of(source))
        else:
            lead = math.prod(shape_of(source)[:dim])
            at = next((d for d in range(len(before)) if math.prod(before[:d]) == lead and before[d] == old), -1)
            if at < 0:
                raise NeedsAllTokens("tokens are regrouped")
        if sizes[at] != -1:
            node.args = (source, [now if d == at else s for d, s in enumerate(sizes)], *node.args[2:])

    def select(self, node: fx.Node) -> None:
        source, dim, index = node.args
        if dim % len(shape_of(source)) == self.dims[source] and not 0 <= index < self.protected:
            raise NeedsAllTokens(f"token {index} by its place")

    def slice(self, node: fx.Node) -> int:
        """Of other dimensions; of tokens the first ones, or all behind them."""
        source, dim, start, end, step = (argument(node, i, n, v) for i, (n, v) in enumerate(
            (("self", None), ("dim", 0), ("start", None), ("end", None), ("step", 1))
        ))  # fmt: skip
        start, end = start or 0, 1 << 62 if end is None else end
        without = self.starts[source]
        if dim % len(shape_of(source)) != self.dims[source]:
            return without
        before = self.before(source)
        if step == 1 and start >= 0 and end >= before and without + start <= self.protected:
            node.args = (source, dim, start, 1 << 62)
            return without + start
        if step != 1 or not 0 <= start <= end <= self.protected - without:
            raise NeedsAllTokens("tokens by their place")
        return without

    def channels(self, node: fx.Node) -> None:
        x = node.args[0]
        over = len(node.args[1]) if node.target in (aten.layer_norm.default, aten.rms_norm.default) else 1
        if self.dims.get(x, len(shape_of(x))) >= len(shape_of(x)) - over or any(
            n in self.dims for n in node.all_input_nodes if n is not x
        ):
            raise NeedsAllTokens("channels are mixed with tokens")

    def concat(self, node: fx.Node) -> int:
        """Of other dimensions; along the tokens, those that stood apart at the front with all others."""
        parts, dim = node.args[0], argument(node, 1, "dim", 0) % len(shape_of(node))
        first, last = [n for n in parts if n not in self.dims], parts[-1]
        if not first and all(self.dims[n] != dim for n in parts):
            if len({self.starts[n] for n in parts}) > 1:
                raise NeedsAllTokens("values of different tokens")
            return self.starts[last]
        apart = sum(shape_of(n)[dim] for n in first)
        if first != list(parts[:-1]) or self.dims.get(last) != dim or apart != self.starts[last]:
            raise NeedsAllTokens("tokens are joined with others")
        return 0

    def over_other_dims(self, node: fx.Node) -> None:
        x, dims = node.args[:2]
        dims = [dims] if isinstance(dims, int) else dims
        if not dims or self.dims[x] in [d % len(shape_of(x)) for d in dims]:
            raise NeedsAllTokens("a sum over all tokens")

    # ------------------------------------------------------------------ what does not

    def restore(self, node: fx.Node, reason: str) -> None:
        """Give ``node`` all tokens."""
        self.blockers.append(f"{node.name}: {reason}")
        for source in [n for n in node.all_input_nodes if n in self.dims]:
            if source not in self._whole:
                dim = self.dims[source]
                if dim == 0 or shape_of(source)[0] != shape_of(self.assign)[0]:
                    raise NeedsAllTokens(f"{node.name}: {reason}, and batch and tokens are one dimension there")
                _, assign = self.apart(self.starts[source])
                self._whole[source] = self.program.insert_call(
                    source.next, ops.restore_tokens.default, (source, assign, dim), like=source
                )
            node.replace_input_with(source, self._whole[source])


def _pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in (
        ops.shrink.default, aten._to_copy.default, aten.to.dtype, aten.clone.default,
    )  # fmt: skip
