"""Each layer passes fewer tokens on: similar ones are merged, or unimportant ones are dropped.

Behind the attention of a layer (and the norm behind it, in post-norm models) the stream X [B, N, C] becomes M X with r fewer tokens
(``thresher.ops.tokens``). Who is alike is judged by the keys of that attention, the mean over its heads (ToMe). Who goes:

    merge       the most similar of alternate tokens                                     (ToMe, Bolya et al., 2023)
    energy      those that are like many others                                          (PiToMe, Tran et al., 2024)
    received    those that receive little attention, merged into the most similar        (DiffRate, Chen et al., 2023)
    pagerank    those of little weight in the graph of attention, s <- A^T s, likewise   (Zero-TPrune, Wang et al., 2024)

and ``drop=true`` removes instead of merging, ``every`` keeps a uniform sample whatever its score (FEATHER, Endo et al., 2024). How many
go in each layer is found under the budget: counts per layer as in DiffRate, without training. What needs every token gets them back.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from thresher.analysis.attention_sites import SDPA, AttentionSite, attention_sites
from thresher.analysis.cost import seconds
from thresher.calibration import watch
from thresher.errors import PassError
from thresher.pass_manager import Context, Note, register_pass
from thresher.passes.tokens.key_sizes import key_sizes, sizes_of_mask
from thresher.passes.tokens.resize import NeedsAllTokens, Resize
from thresher.program import Program, dtype_of, is_tensor, module_path, shape_of
from thresher.selection import BoundedPass, Candidate

aten, ops = torch.ops.aten, torch.ops.thresher
SCORES = {"merge": "alternate", "energy": "energy", "received": "lowest", "pagerank": "lowest"}
PARTS = (0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5)  # of the tokens, that go in a layer
FEWEST = 16  # tokens
ROUNDS = 3  # of page rank
WITNESSES = 64  # queries whose attention counts
ENERGY_MARGIN = 0.5  # of a cosine, from which on tokens are alike
SAMPLES = 8


@dataclass(frozen=True)
class Stream:
    """Where a layer's tokens can become fewer: the value behind its attention, and that attention."""

    value: fx.Node
    site: AttentionSite

    @property
    def tokens(self) -> int:
        return shape_of(self.value)[1]


@register_pass
@dataclass(frozen=True)
class ReduceTokens(BoundedPass):
    """Merge or drop tokens from layer to layer, within the budget."""

    name: ClassVar[str] = "reduce-tokens"
    target_ops: ClassVar[tuple] = (SDPA,)
    score: str = "merge,received"  # which kinds to try
    drop: bool = False
    every: int = 0
    protected: int = -1  # tokens at the front that stay; -1: those that are read by their place

    def kinds(self) -> list[str]:
        found = [k.strip() for k in self.score.replace("+", ",").split(",")]
        if unknown := [k for k in found if k not in SCORES]:
            raise PassError(f"reduce-tokens has no score {unknown[0]!r}; it has {', '.join(SCORES)}")
        return found

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, refusals = streams(program)
        before, usable, gains = seconds(program, context.machine), [], {}
        protected = self.front(program)
        for stream in found:
            count = self.most(stream, protected)
            try:
                work = program.clone()
                blockers = (
                    self.edit(work, stream.value.name, self.kinds()[0], count) if count > 0 else ["too few tokens"]
                )
                gain = (before - seconds(work.clean(), context.machine)) / max(count, 1)
            except NeedsAllTokens as reason:
                blockers, gain = [str(reason)], 0.0
            if gain > 0:
                usable.append(stream)
                gains[stream.value] = gain
            else:
                why = "; ".join(blockers[:3]) or "matching costs as much as the layers behind save"
                refusals.append(Note.at(stream.value, f"fewer tokens save nothing here: {why}"))
        context.progress(f"{self.name}: {len(usable)} layers")
        errors = self.errors(program, usable, protected, context.calibration.choosing[:SAMPLES])
        made = []
        for stream in usable:
            for (kind, count), error in errors[stream.value].items():
                key, where = stream.value.name, module_path(stream.site.node)
                choice = f"{count} of {stream.tokens} tokens go ({kind}{', dropped' if self.drop else ''})"
                gain = count * gains[stream.value]
                made.append(
                    Candidate(key, f"{where} {kind}", choice, error, gain, stream.value.name, where, (kind, count))
                )
        return made, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work, order = program.clone(), {n.name: i for i, n in enumerate(program.graph.nodes)}
        for candidate in sorted(chosen, key=lambda c: order[c.node]):
            self.edit(work, candidate.node, *candidate.payload)
        return work.clean()

    # ------------------------------------------------------------------ how many can go

    def front(self, program: Program) -> int:
        """Tokens at the front that something reads by their place."""
        return self.protected if self.protected >= 0 else read_by_place(program)

    def most(self, stream: Stream, protected: int) -> int:
        """At most half of those that may go, and FEWEST stay."""
        free = stream.tokens - protected - (-(-stream.tokens // self.every) if self.every else 0)
        return min(free // 2, stream.tokens - max(FEWEST, protected + 1))

    def counts(self, stream: Stream, protected: int) -> list[int]:
        most = self.most(stream, protected)
        return sorted({min(most, max(1, round(p * stream.tokens))) for p in PARTS}) if most > 0 else []

    def errors(
        self, program: Program, found: Sequence[Stream], protected: int, samples: Sequence[list[Any]]
    ) -> dict[fx.Node, dict[tuple[str, int], float]]:
        """The squared relative change that merging (or dropping) makes to the stream, by kind and count."""
        sums = {s.value: {(k, c): 0.0 for k in self.kinds() for c in self.counts(s, protected)} for s in found}
        keep: dict[fx.Node, dict[fx.Node, Any]] = {}

        def remember(stream: Stream, values: dict[fx.Node, Any]) -> None:
            keep[stream.value] = {n: values[n].float() for n in (stream.site.q, stream.site.k)}
            mask = stream.site.mask
            keep[stream.value] |= {} if mask is None else {mask: values[mask]}

        def compare(stream: Stream, values: dict[fx.Node, Any]) -> None:
            x, site = values[stream.value].float(), stream.site
            known = keep.pop(stream.value)
            size = sizes_of_mask(None if site.mask is None else known[site.mask], *x.shape[:2])
            for kind, count in sums[stream.value]:
                scores, similar = _judge(kind, known[site.q], known[site.k], size, site.scale)
                side = ops.token_sides(scores, size, SCORES[kind], count, protected, self.every)
                assign, _ = ops.match_tokens(similar, size, side, count, self.drop)
                back = ops.restore_tokens(ops.reduce_tokens(x, size, assign, x.shape[1] - count), assign, 1)
                weight = size.unsqueeze(-1)
                change = ((back - x).square() * weight).sum() / (x.square() * weight).sum().clamp(min=1e-30)
                sums[stream.value][kind, count] += float(change) / len(samples)

        seen = {s.site.node: partial(remember, s) for s in found} | {s.value: partial(compare, s) for s in found}
        watch(program, samples, seen)
        return sums

    # ------------------------------------------------------------------ the rewrite

    def edit(self, program: Program, name: str, kind: str, count: int) -> list[str]:
        """Let ``count`` tokens go behind the value ``name``; returns who needed all of them."""
        stream = next(s for s in streams(program)[0] if s.value.name == name)
        protected = self.front(program)
        count = min(count, self.most(stream, protected))
        if count <= 0:
            return []
        x, site, tokens = stream.value, stream.site, stream.tokens
        insert = _Insert(program, x)
        size = key_sizes(program, site, insert.place)
        scores, similar = insert.judge(kind, site, size)
        side = insert(ops.token_sides.default, scores, size, SCORES[kind], count, protected, self.every)
        match = insert(ops.match_tokens.default, similar, size, side, count, self.drop)
        assign, sizes = (insert(operator.getitem, match, i) for i in range(2))
        reduced = insert(ops.reduce_tokens.default, x, size, assign, tokens - count)
        resize = Resize(program, x, reduced, assign, sizes, site.mask, protected)
        resize.run()
        return resize.blockers


def streams(program: Program) -> tuple[list[Stream], list[Note]]:
    """The places behind attentions of tokens to themselves, and refusals."""
    found, refusals = [], []
    for site in attention_sites(program)[0]:
        value = _stream_behind(site)
        if isinstance(value, str):
            refusals.append(Note.at(site.node, f"its tokens cannot become fewer: {value}"))
        else:
            found.append(Stream(value, site))
    return found, refusals


def _stream_behind(site: AttentionSite) -> fx.Node | str:
    """The residual sum behind an attention, and the norm behind that, if it is all that reads the sum."""
    batch, _, rows, keys = site.shape
    if rows != keys:
        return "queries and keys are different tokens"
    if site.causal or (site.mask is not None and (len(shape_of(site.mask)) != 4 or shape_of(site.mask)[1:3] != (1, 1))):
        return "a mask by places"
    node: fx.Node | None = site.node
    while node is not None:
        node = next(iter(node.users)) if len(node.users) == 1 else None
        if node is None or not is_tensor(node) or node.op == "output":
            return "no residual sum behind it"
        if node.target is aten.add.Tensor and all(
            is_tensor(n) and shape_of(n) == shape_of(node) for n in node.args[:2]
        ):
            break
        if node.target not in (
            aten.permute.default,
            aten.reshape.default,
            aten.linear.default,
            aten.mul.Tensor,
            aten.layer_norm.default,
        ):
            return f"{node.target} stands between it and the residual sum"
    assert node is not None
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if after is not None and after.target in (aten.layer_norm.default, aten.rms_norm.default):
        node = after
    if len(shape_of(node)) != 3 or shape_of(node)[:2] != (batch, rows) or dtype_of(node) is not torch.float32:
        return "the residual sum is not [batch, tokens, channels] in float32"
    return node


def read_by_place(program: Program) -> int:
    """How many tokens at the front of streams are selected by their number."""
    first = 0
    for node in program.calls(aten.select.int, aten.slice.Tensor):
        source = node.args[0]
        if (
            len(shape_of(source)) != 3
            or len(node.args) < 3
            or node.args[1] % 3 != 1
            or program.constant(source) is not None
        ):
            continue
        end = node.args[2] + 1 if node.target is aten.select.int else node.args[3] if len(node.args) > 3 else 1 << 62
        if 0 < end <= 8:
            first = max(first, end)
    return first


def _judge(kind: str, q: Tensor, k: Tensor, size: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [B, N] and similarities [B, N, N]: what the inserted nodes compute, on values."""
    return _judged(_Eager(), kind, q, k, size, scale)


class _Eager:
    """Runs calls instead of inserting them."""

    def __call__(self, target: Any, *args: Any) -> Any:
        return target(*args)


class _Insert:
    """Inserts calls behind ``value``."""

    def __init__(self, program: Program, value: fx.Node):
        self.program, self.place, self.like = program, value.next, value

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        return self.program.insert_call(self.place, target, args, like=self.like)

    def judge(self, kind: str, site: AttentionSite, size: fx.Node) -> tuple[fx.Node, fx.Node]:
        return _judged(self, kind, site.q, site.k, size, site.scale)


def _judged(call: Any, kind: str, q: Any, k: Any, size: Any, scale: float) -> tuple[Any, Any]:
    metric = call(aten.mean.dim, k, [1])
    norm = call(aten.clamp.default, call(aten.linalg_vector_norm.default, metric, 2, [-1], True), 1e-12)
    unit = call(aten.div.Tensor, metric, norm)
    similar = call(aten.matmul.default, unit, call(aten.permute.default, unit, [0, 2, 1]))
    if kind == "merge":
        return size, similar
    if kind == "energy":
        near = call(aten.sub.Tensor, similar, ENERGY_MARGIN)
        return call(aten.mean.dim, call(aten.elu.default, near), [-1]), similar
    return _received(call, kind, q, k, size, scale), similar


def _received(call: Any, kind: str, q: Any, k: Any, size: Any, scale: float) -> Any:
    """The attention that every token receives, the mean over heads and over WITNESSES queries from all along the sequence; for page rank
    over all queries, each weighted by what it receives itself."""
    batch, heads, tokens, _ = _shape(k)
    if _shape(q)[1] != heads:
        raise NeedsAllTokens("grouped heads")
    if kind == "received" and tokens > WITNESSES:
        q = call(aten.slice.Tensor, q, 2, 0, tokens, tokens // WITNESSES)
    scores = call(aten.matmul.default, call(aten.mul.Tensor, q, scale), call(aten.permute.default, k, [0, 1, 3, 2]))
    there = call(aten.log.default, call(aten.clamp.default, size, 1e-30))
    scores = call(aten.add.Tensor, scores, call(aten.reshape.default, there, [batch, 1, 1, tokens]))
    weights = call(aten.mean.dim, call(aten.softmax.int, scores, -1), [1])
    if kind == "received":
        return call(aten.mean.dim, weights, [1])
    rank = call(aten.reshape.default, size, [batch, 1, tokens])
    for _ in range(ROUNDS):
        rank = call(aten.matmul.default, rank, weights)
    return call(aten.reshape.default, rank, [batch, tokens])


def _shape(value: Any) -> tuple:
    return shape_of(value) if isinstance(value, fx.Node) else tuple(value.shape)
