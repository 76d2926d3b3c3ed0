"""Attention to means of neighbouring keys and values, instead of all of them.

    attention(q, k, v) ~ attention(q, M k, M v, mask + log sizes)        M: means of runs (or squares) of tokens

(Spatial reduction: PVT, Wang et al., 2021; averages: LITv2's Lo-Fi heads, Pan et al., 2022; Funnel, Dai et al., 2020.) Tokens at the front
that are no part of an image stay. Where keys and values come from a linear layer of their own, the mean is taken before it, which is the
same and saves that part of the layer, too. Tokens that a mask of keys forbids do not enter the means.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.attention.sites import SDPA, AttentionSite, attention_sites
from thresher.analysis.cost.cost import seconds
from thresher.approximation.search import Candidate
from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program, Role
from thresher.passes.attention._patterns import grid_of
from thresher.passes.attention._site_errors import Values, attend, site_errors
from thresher.passes.tokens._key_sizes import key_sizes, sizes_of_mask
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note
from thresher.rewriting.registry import register_pass

aten, ops = torch.ops.aten, torch.ops.thresher
FEWEST = 32  # keys
SAMPLES = 8


@dataclass(frozen=True)
class Pooling:
    """Which keys are averaged: ``assign`` int64 [S], the number of means, and in words."""

    assign: Tensor
    count: int
    words: str


@register_pass
@dataclass(frozen=True)
class PoolKeys(ApproximatePass):
    """Attend to means of neighbouring keys and values, within the budget."""

    name: ClassVar[str] = "pool-keys"
    target_ops: ClassVar[tuple] = (SDPA,)
    factors: tuple[int, ...] = (2, 4, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(all(f > 1 for f in self.factors), "factors", "numbers of keys from 2 on")

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        assert context.calibration is not None
        found, others = attention_sites(program)
        refusals = [Note.at(node, reason) for node, reason in others.items()]
        refusals += [Note.at(s.node, f"its keys are not averaged: {reason}") for s in found if (reason := _unfit(s))]
        sites = [s for s in found if not _unfit(s)]
        own = {s.node: {p.words: p for p in poolings(s.shape[3], self.factors)} for s in sites}

        def variants(site: AttentionSite, values: Values) -> dict[Hashable, Tensor]:
            return {words: _pooled(site, values, p) for words, p in own[site.node].items()}

        context.progress(f"{self.name}: {len(sites)} sites")
        errors = site_errors(program, sites, variants, context.calibration.search_samples[:SAMPLES])
        before, made = seconds(program, context.machine), []
        for site in sites:
            for words, pooling in own[site.node].items():
                where, trial = (site.node.name, site.module), program.clone()
                edit(trial, site.node.name, pooling)
                saved = before - seconds(trial.clean(), context.machine)
                made.append(
                    Candidate(site.node.name, site.module, words, errors[site.node][words], saved, *where, pooling)
                )
        return made, refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        for candidate in chosen:
            edit(work, candidate.node, candidate.payload)
        return work.clean()


def poolings(keys: int, factors: Sequence[int]) -> list[Pooling]:
    """Runs of neighbours, and squares where the tokens can be those of a square image."""
    found: list[Pooling] = []
    place = torch.arange(keys)
    grid = grid_of(keys)
    for factor in factors:
        root = math.isqrt(factor)
        if grid and root * root == factor:
            side, prefix = grid
            inside, across = place - prefix, -(-side // root)
            square = inside // side // root * across + inside % side // root + prefix
            assign = torch.where(place < prefix, place, square)
            found.append(Pooling(assign, prefix + across * across, f"means of {root} x {root} keys"))
        prefix = grid[1] if grid else 0
        assign = torch.where(place < prefix, place, (place - prefix) // factor + prefix)
        found.append(Pooling(assign, prefix + -(-(keys - prefix) // factor), f"means of {factor} keys"))
    return [p for p in found if p.count >= FEWEST]


def _unfit(site: AttentionSite) -> str:
    if site.causal:
        return "causal: a mean would look ahead"
    if site.masks_by_position:
        return "a mask by places"
    return "" if poolings(site.shape[3], (2, 4)) else f"{site.shape[3]} keys are few already"


def _pooled(site: AttentionSite, values: Values, pooling: Pooling) -> Tensor:
    """The site's output over means, on values."""
    k, v, bias = means_of_keys(site, values, pooling)
    return attend(site, values[site.q], k, v, bias)


def means_of_keys(site: AttentionSite, values: Values, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """Means of keys and values [B, G, count, E], and what is added to their scores, [B, 1, 1, count]; on values."""
    size = sizes_of_mask(None if site.mask is None else values[site.mask], site.shape[0], site.shape[3])
    assign = pooling.assign.expand(site.shape[0], -1)
    k, v = (_means(values[n], size, assign, pooling.count) for n in (site.k, site.v))
    total = torch.zeros(size.shape[0], pooling.count).scatter_add(1, assign, size)
    return k, v, total.log()[:, None, None]


def _means(x: Tensor, size: Tensor, assign: Tensor, count: int) -> Tensor:
    flat = x.transpose(1, 2).flatten(2)
    return ops.reduce_tokens(flat, size, assign, count).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def edit(program: Program, name: str, pooling: Pooling) -> None:
    """The site ``name`` over means of its keys and values."""
    site = next(s for s in attention_sites(program)[0] if s.node.name == name)
    k, v, bias = pooled_keys(program, site, pooling)
    site.node.args = (site.q, k, v)
    kept = {n: a for n, a in site.node.kwargs.items() if n not in ("attn_mask", "scale")}
    site.node.kwargs = {**kept, "attn_mask": bias, "scale": site.scale}
    program.refresh(site.node)


def pooled_keys(program: Program, site: AttentionSite, pooling: Pooling) -> tuple[fx.Node, fx.Node, fx.Node]:
    """:func:`means_of_keys` in the graph, before the site."""
    node, batch, name = site.node, site.shape[0], site.node.name

    def call(target: Any, *args: Any) -> fx.Node:
        return program.insert_call(node, target, args, like=node)

    size = key_sizes(program, site, node)
    members = pooling.assign.bincount(minlength=pooling.count).to(dtype_of(site.k))
    assign, counted, even = (
        program.add_constant(value.contiguous(), f"{name}_{word}", like=node, role=Role.BUFFER)
        for word, value in (
            ("means", pooling.assign.expand(batch, -1)),
            ("members", members.reshape(1, -1)),
            ("even", torch.ones(batch, site.shape[3], dtype=dtype_of(site.k))),
        )
    )
    mean_size = call(ops.reduce_tokens.default, call(aten.unsqueeze.default, size, 2), even, assign, pooling.count)
    total = call(aten.mul.Tensor, call(aten.squeeze.dim, mean_size, 2), counted)
    bias = call(aten.reshape.default, call(aten.log.default, total), [batch, 1, 1, pooling.count])
    done: dict[fx.Node, fx.Node] = {}

    def pooled(x: fx.Node) -> fx.Node:
        """[B, S, C] -> [B, count, C]"""
        if x not in done:
            done[x] = call(ops.reduce_tokens.default, x, size, assign, pooling.count)
        return done[x]

    k, v = (_before_or_after(program, node, n, pooled, pooling.count) for n in (site.k, site.v))
    return k, v, bias


def _before_or_after(program: Program, node: fx.Node, x: fx.Node, pooled: Any, count: int) -> fx.Node:
    """Means of [B, G, S, E]: before the linear layer it comes from, if it has one of its own, else of itself."""
    batch, heads, keys, width = shape_of(x)

    def call(target: Any, *args: Any) -> fx.Node:
        return program.insert_call(node, target, args, like=node)

    linear = _linear_of(x)
    if linear is not None:
        flat = call(linear.target, pooled(linear.args[0]), *linear.args[1:])
    else:
        flat = pooled(
            call(aten.reshape.default, call(aten.permute.default, x, [0, 2, 1, 3]), [batch, keys, heads * width])
        )
    return call(aten.permute.default, call(aten.reshape.default, flat, [batch, count, heads, width]), [0, 2, 1, 3])


def _linear_of(x: fx.Node) -> fx.Node | None:
    """The layer that nothing but ``x`` reads: linear -> reshape -> permute."""
    if x.target is not aten.permute.default or [d % 4 for d in x.args[1]] != [0, 2, 1, 3]:
        return None
    heads = x.args[0]
    if heads.target is not aten.reshape.default or any(len(n.users) != 1 for n in (x, heads, heads.args[0])):
        return None
    linear, (batch, _, keys, _) = heads.args[0], shape_of(x)
    return linear if linear.target is aten.linear.default and shape_of(linear)[:-1] == (batch, keys) else None
