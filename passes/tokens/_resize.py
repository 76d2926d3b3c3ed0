"""Everything after a value with fewer tokens is made for fewer tokens; where something needs all of them, they are restored first.

    f(X)  ->  f(M X)                                 f treats tokens as a set: pointwise operators, linear layers and norms over channels
    softmax(q k^T) v  ->  softmax(q (M k)^T + log size) (M v)
    f(X)  ->  f(restore_tokens(M X))                 f does not: convolutions, scans, means and softmax over tokens, sums with values of
                                                     another length, outputs

Numbers that belong to positions (rotary positions) become those of the tokens whose slots they are. Tokens at the front may stand apart for
a while.
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
from thresher.rewriting.calls import inserter

aten, ops = torch.ops.aten, torch.ops.thresher
MOVES = (aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims)
NORMS = (aten.layer_norm.default, aten.rms_norm.default, ops.layer_norm.default)


class NeedsAllTokens(Exception):
    """Raised with the reason why an operator does not take fewer tokens."""


@dataclass
class Resize:
    """One reduction: ``source`` [B, N, C] became ``reduced`` [B, N - r, C] by ``assign``.

    ``sizes`` [B, N - r] of the slots stand for what the ``mask`` of keys said before, ``owners`` [B, N] are the tokens whose slots they
    are; ``protected`` tokens at the front are where they were. ``dims``: the dimension of tokens of each value that has fewer;
    ``starts``: how many at the front it lacks. ``blockers`` describes the operators that needed all tokens.
    """

    program: Program
    source: fx.Node
    reduced: fx.Node
    assign: fx.Node
    sizes: fx.Node
    owners: fx.Node
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
        """Let everything after ``source`` read ``reduced``."""
        later = [n for n in self.program.graph.nodes if n > self.reduced]
        for user in [u for u in self.source.users if u > self.reduced]:
            user.replace_input_with(self.source, self.reduced)
        self.dims[self.reduced], self.starts[self.reduced] = 1, 0
        for node in later:
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
        """Return the token dimension of the result: the one whose size changed."""
        if not isinstance(before, torch.Tensor):
            raise NeedsAllTokens("several results")
        dims = [d for d, (a, b) in enumerate(zip(before.shape, shape_of(node))) if a != b]
        if len(before.shape) != len(shape_of(node)) or len(dims) > 1:
            raise NeedsAllTokens("tokens in more than one dimension")
        return {node: dims[0]} if dims else {}

    # ------------------------------------------------------------------ what takes fewer tokens

    def fit(self, node: fx.Node) -> int:
        """Make the arguments of ``node`` right; returns how many tokens at the front the result lacks."""
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
        """Let operands that belong to positions go with the tokens."""
        rank = max(len(shape_of(n)) for n in node.all_input_nodes)
        x = next(n for n in node.all_input_nodes if n in self.dims)
        from_end = len(shape_of(x)) - self.dims[x]  # the dimension of the tokens, from the last one
        for other in node.all_input_nodes:
            shape = shape_of(other)
            if other not in self.dims and len(shape) >= from_end and shape[-from_end] == self.before(x):
                node.replace_input_with(
                    other, self.placed(other, self.starts[x], len(shape) - from_end, rank - from_end)
                )
        torch.broadcast_shapes(*(shape_of(n) for n in node.all_input_nodes))

    def before(self, x: fx.Node) -> int:
        """Return the number of tokens that ``x`` had."""
        return shape_of(self.source)[1] - self.starts[x]

    def placed(self, x: fx.Node, start: int, dim: int, to: int) -> fx.Node:
        """Return x [.., 1, N - start, *rest], the tokens at ``dim``, as [B, .., 1, N' - start, *rest] with the tokens at ``to``.

        Every slot gets the numbers of the token whose slot it is.
        """
        if (x, start, to) in self._placed:
            return self._placed[x, start, to]
        if to < 1 or any(d != 1 for d in shape_of(x)[:dim]):
            raise NeedsAllTokens("numbers that differ from sample to sample or head to head belong to positions")
        tokens, rest, batch = shape_of(x)[dim], shape_of(x)[dim + 1 :], shape_of(self.source)[0]
        owners, assign = self.apart(start)
        last = x if x > self.reduced else assign if start else self.reduced

        def call(target: Any, *args: Any) -> fx.Node:
            nonlocal last
            last = self.program.insert_call(last.next, target, args, like=x)
            return last

        flat = call(aten.reshape.default, x, [1, tokens, math.prod(rest)])
        flat = call(aten.expand.default, flat, [batch, tokens, math.prod(rest)])
        remaining = shape_of(self.reduced)[1] - start
        of_slots = call(ops.reduce_tokens.default, flat, owners, assign, remaining)
        self._placed[x, start, to] = call(aten.reshape.default, of_slots, [batch, *[1] * (to - 1), remaining, *rest])
        return self._placed[x, start, to]

    def apart(self, start: int) -> tuple[fx.Node, fx.Node]:
        """Return ``owners`` and ``assign`` without the first ``start`` tokens."""
        if start and start not in self._apart:
            before, end = self.reduced.next, shape_of(self.source)[1]
            call = inserter(self.program, before, like=self.reduced)
            owners, assign = (call(aten.slice.Tensor, n, 1, start, end) for n in (self.owners, self.assign))
            lower = call(aten.sub.Tensor, assign, start)
            self._apart[start] = owners, call(aten.clamp.default, lower, -1)
        return self._apart[start] if start else (self.owners, self.assign)

    def attention(self, node: fx.Node) -> None:
        """Let an attention read fewer keys, with log(size) as its mask."""
        q, k, v = node.args[:3]
        rank = len(shape_of(q))
        if any(self.dims.get(n, rank - 2) != rank - 2 for n in (q, k, v)):
            raise NeedsAllTokens("attention over another dimension than tokens")
        if argument(node, 5, "is_causal", False):
            raise NeedsAllTokens("causal attention: a token that stands for several has no position")
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
        """Return log(size) of the keys, [B, 1, 1, N - r]; -inf for padding."""
        if self._bias is None:
            batch, tokens = shape_of(self.sizes)
            with_origin = dict(like=self.reduced)
            before = self.reduced.next
            log = self.program.insert_call(before, aten.log.default, (self.sizes,), **with_origin)
            shape = [batch, *[1] * (rank - 2), tokens]
            self._bias = self.program.insert_call(before, aten.reshape.default, (log, shape), **with_origin)
        return self._bias

    def sizes_of(self, node: fx.Node) -> None:
        """Write the new sizes into the arguments of reshape and expand."""
        source, sizes = node.args[:2]
        dim, before = self.dims[source], shape_of(node)
        now = shape_of(source)[dim]
        old = self.before(source)
        if node.target is aten.expand.default:
            position = dim + len(before) - len(shape_of(source))
        else:
            lead = math.prod(shape_of(source)[:dim])
            position = next((d for d in range(len(before)) if math.prod(before[:d]) == lead and before[d] == old), -1)
            if position < 0:
                raise NeedsAllTokens("tokens are regrouped")
        if sizes[position] != -1:
            node.args = (source, [now if d == position else s for d, s in enumerate(sizes)], *node.args[2:])

    def select(self, node: fx.Node) -> None:
        """Let one of the protected tokens be selected."""
        source, dim, index = node.args
        if dim % len(shape_of(source)) == self.dims[source] and not 0 <= index < self.protected:
            raise NeedsAllTokens(f"token {index} by its position")

    def slice(self, node: fx.Node) -> int:
        """Let other dimensions be sliced, and of the tokens the first ones, or all after them; returns what :meth:`fit` does."""
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
            raise NeedsAllTokens("tokens by their position")
        return without

    def channels(self, node: fx.Node) -> None:
        """Let a linear layer or a norm work over channels that are no tokens."""
        x = node.args[0]
        over = len(node.args[1]) if node.target in (aten.layer_norm.default, aten.rms_norm.default) else 1
        if self.dims.get(x, len(shape_of(x))) >= len(shape_of(x)) - over or any(
            n in self.dims for n in node.all_input_nodes if n is not x
        ):
            raise NeedsAllTokens("channels are mixed with tokens")

    def concat(self, node: fx.Node) -> int:
        """Let other dimensions be joined, and along the tokens those that stood apart with all others; returns what :meth:`fit` does."""
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
        """Let a reduction work over dimensions that are no tokens."""
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
