"""Each layer passes fewer tokens on: similar ones are merged, or unimportant ones are dropped.

    X [B, N, C]  ->  M X [B, N - r, C]        M: means over merged tokens, weighted by how many each stands for (``thresher.ops.tokens``)

for the stream X after the attention of a layer (and the norm after it, in post-norm models). Which tokens are alike is decided by the keys
of that attention, the mean over its heads (ToMe). Those that go (``_importance.py`` has the scores, and how they are simplified):

    merge       the most similar of alternate tokens                                     (ToMe, Bolya et al., 2023)
    energy      those that are like many others                                          (PiToMe, Tran et al., 2024)
    received    those that receive little attention, merged into the most similar        (DiffRate, Chen et al., 2023)
    pagerank    those of little weight in the graph of attention, s <- A^T s, likewise   (Zero-TPrune, Wang et al., 2024)

and ``drop=true`` removes instead of merging, ``every`` keeps a uniform sample whatever its score (FEATHER, Endo et al., 2024). How many
go in each layer is found under the budget: counts per layer as in DiffRate, without training. What needs every token gets them back.
Refused: cross-attention, causal attention and masks by position, and layers whose tokens save less than matching them costs.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.attention.sites import SDPA
from thresher.analysis.cost.cost import seconds
from thresher.approximation.calibration import Calibration, watch
from thresher.approximation.search import Candidate
from thresher.ir.nodes import module_path
from thresher.ir.program import Program
from thresher.passes.tokens._by_position import describe_positions
from thresher.passes.tokens._importance import SIDES, judge
from thresher.passes.tokens._resize import NeedsAllTokens, Resize
from thresher.passes.tokens._streams import Stream, read_by_position, streams
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.calls import at_once, inserter
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.key_sizes import key_sizes, sizes_of_mask
from thresher.rewriting.options import names_in
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
FRACTIONS = (0.03, 0.06, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5)  # of the tokens, that go in a layer
MIN_TOKENS = 16  # that stay
MAX_SAMPLES = 8


@register_pass
@dataclass(frozen=True)
class ReduceTokens(ApproximatePass):
    """Merge or drop tokens from layer to layer, within the budget."""

    name: ClassVar[str] = "reduce-tokens"
    target_ops: ClassVar[tuple] = (SDPA,)
    kinds: str = "merge,received"  # of scores, that are tried; joined by commas or plus signs
    drop: bool = False  # remove tokens instead of merging them
    every: int = 0  # one of so many tokens always stays; 0: no such sample
    protected: int = -1  # tokens at the front that stay; -1: those that are read by their position

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_names("kinds", SIDES)
        self.require(self.every >= 0, "every", "a number of tokens, or 0 for no uniform sample")
        self.require(
            self.protected >= -1, "protected", "a number of tokens, or -1 for those that are read by their position"
        )

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        all_streams, refusals = streams(program)
        protected, savings = self.front(program), {}
        for stream in all_streams:
            for kind in names_in(self.kinds):
                saving, reason = self.saving(program, stream, kind, protected, context)
                if saving > 0:
                    savings[stream.value, kind] = saving
                else:
                    refusals.append(Note.at(stream.value, f"fewer tokens ({kind}) save nothing here: {reason}"))
        usable = [s for s in all_streams if any((s.value, k) in savings for k in names_in(self.kinds))]
        context.progress(f"{self.name}: {len(usable)} layers")
        errors = self.errors(program, usable, protected, context.calibration.search_samples[:MAX_SAMPLES])
        candidates = []
        for stream in usable:
            name, module = stream.value.name, module_path(stream.site.node)
            for (kind, count), error in errors[stream.value].items():
                choice = f"{count} of {stream.tokens} tokens go ({kind}{', dropped' if self.drop else ''})"
                saved, group = count * savings.get((stream.value, kind), 0.0), f"{module} {kind}"
                candidates.append(Candidate(name, group, choice, error, saved, name, module, (kind, count)))
        return candidates, refusals

    def saving(
        self, program: Program, stream: Stream, kind: str, protected: int, context: Context
    ) -> tuple[float, str]:
        """Return the seconds that each token saves that goes here, and why there are none."""
        count = self.max_count(stream, protected)
        if count <= 0:
            return 0.0, f"{stream.tokens} tokens are too few"
        try:
            work = program.clone()
            blockers = self.reduce(work, stream.value.name, kind, count)
        except NeedsAllTokens as reason:
            return 0.0, str(reason)
        saved = seconds(program, context.machine) - seconds(work.clean(), context.machine)
        return saved / count, "; ".join(blockers[:3]) or "matching costs as much as the layers after it save"

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work, order = program.clone(), {n.name: i for i, n in enumerate(program.graph.nodes)}
        for candidate in sorted(chosen, key=lambda c: order[c.node]):
            self.reduce(work, candidate.node, *candidate.payload)
        return work.clean()

    def checks(self, result: Program, calibration: Calibration) -> list[str]:
        return describe_positions(result, calibration)

    # ------------------------------------------------------------------ how many can go

    def front(self, program: Program) -> int:
        """Return the number of tokens at the front that something reads by their position."""
        return self.protected if self.protected >= 0 else read_by_position(program)

    def max_count(self, stream: Stream, protected: int) -> int:
        """Return how many can go: at most half of those that may, and MIN_TOKENS stay."""
        free = stream.tokens - protected - (-(-stream.tokens // self.every) if self.every else 0)
        return min(free // 2, stream.tokens - max(MIN_TOKENS, protected + 1))

    def counts(self, stream: Stream, protected: int) -> list[int]:
        """Return the numbers of tokens to go that are tried, ascending."""
        limit = self.max_count(stream, protected)
        return sorted({min(limit, max(1, round(p * stream.tokens))) for p in FRACTIONS}) if limit > 0 else []

    def errors(
        self, program: Program, reduced_streams: Sequence[Stream], protected: int, samples: Sequence[list[Any]]
    ) -> dict[fx.Node, dict[tuple[str, int], float]]:
        """Return the squared relative change that merging (or dropping) makes to each stream, by kind and count."""
        sums = {
            s.value: {(k, c): 0.0 for k in names_in(self.kinds) for c in self.counts(s, protected)}
            for s in reduced_streams
        }
        inputs: dict[fx.Node, dict[fx.Node, Any]] = {}

        def remember(stream: Stream, values: dict[fx.Node, Any]) -> None:
            inputs[stream.value] = {n: values[n].float() for n in (stream.site.q, stream.site.k)}
            mask = stream.site.mask
            inputs[stream.value] |= {} if mask is None else {mask: values[mask]}

        def compare(stream: Stream, values: dict[fx.Node, Any]) -> None:
            x, site = values[stream.value].float(), stream.site
            own_inputs = inputs.pop(stream.value)
            size = sizes_of_mask(None if site.mask is None else own_inputs[site.mask], *x.shape[:2])
            for kind, count in sums[stream.value]:
                scores, similar = judge(at_once, kind, own_inputs[site.q], own_inputs[site.k], size, site.scale)
                side = ops.token_sides(scores, size, SIDES[kind], count, protected, self.every)
                assign, *_ = ops.match_tokens(similar, size, side, count, self.drop)
                back = ops.restore_tokens(ops.reduce_tokens(x, size, assign, x.shape[1] - count), assign, 1)
                weight = size.unsqueeze(-1)
                change = ((back - x).square() * weight).sum() / (x.square() * weight).sum().clamp(min=1e-30)
                sums[stream.value][kind, count] += float(change) / len(samples)

        seen = {s.site.node: partial(remember, s) for s in reduced_streams} | {
            s.value: partial(compare, s) for s in reduced_streams
        }
        watch(program, samples, seen)
        return sums

    # ------------------------------------------------------------------ the rewrite

    def reduce(self, program: Program, name: str, kind: str, count: int) -> list[str]:
        """Let ``count`` tokens go after the value ``name``; returns the operators that needed all of them."""
        stream = next(s for s in streams(program)[0] if s.value.name == name)
        protected = self.front(program)
        count = min(count, self.max_count(stream, protected))
        if count <= 0:
            return []
        x, site, tokens = stream.value, stream.site, stream.tokens
        before = x.next
        insert = inserter(program, before, like=x)
        size = key_sizes(program, site, before)
        scores, similar = judge(insert, kind, site.q, site.k, size, site.scale)
        side = insert(ops.token_sides.default, scores, size, SIDES[kind], count, protected, self.every)
        match = insert(ops.match_tokens.default, similar, size, side, count, self.drop)
        assign, sizes, owners = (insert(operator.getitem, match, i) for i in range(3))
        reduced = insert(ops.reduce_tokens.default, x, size, assign, tokens - count)
        resize = Resize(program, x, reduced, assign, sizes, owners, site.mask, protected)
        resize.run()
        return resize.blockers
