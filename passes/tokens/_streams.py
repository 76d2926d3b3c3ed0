"""The residual streams in which tokens can become fewer: those after an attention of tokens to themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from thresher.analysis.attention.sites import AttentionSite, attention_sites
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Note

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
MAX_FRONT = 8  # tokens that may stand apart
BETWEEN = (aten.permute.default, aten.reshape.default, aten.linear.default, aten.mul.Tensor, aten.layer_norm.default)


@dataclass(frozen=True)
class Stream:
    """A value whose tokens can become fewer, and the attention that it follows."""

    value: fx.Node
    site: AttentionSite

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return shape_of(self.value)[1]


def streams(program: Program) -> tuple[list[Stream], list[Note]]:
    """Return the streams after attentions of tokens to themselves, and refusals."""
    result, refusals = [], []
    for site in attention_sites(program)[0]:
        value = _stream_after(site)
        if isinstance(value, str):
            refusals.append(Note.at(site.node, f"its tokens cannot become fewer: {value}"))
        else:
            result.append(Stream(value, site))
    return result, refusals


def _stream_after(site: AttentionSite) -> fx.Node | str:
    """Return the residual sum after an attention, or the norm after that where it alone reads the sum; else why there is none."""
    batch, _, rows, keys = site.shape
    if rows != keys:
        return "queries and keys are different tokens"
    if site.causal or site.masks_by_position:
        return "causal, or its mask differs from query to query"
    node: fx.Node | None = site.node
    while node is not None:
        node = next(iter(node.users)) if len(node.users) == 1 else None
        if node is None or not is_tensor(node) or node.op == "output":
            return "no residual sum follows it"
        if node.target is aten.add.Tensor and all(
            is_tensor(n) and shape_of(n) == shape_of(node) for n in node.args[:2]
        ):
            break
        if node.target not in BETWEEN:
            return f"{node.target} stands between it and the residual sum"
    assert node is not None
    after = next(iter(node.users)) if len(node.users) == 1 else None
    if after is not None and after.target in NORMS:
        node = after
    if len(shape_of(node)) != 3 or shape_of(node)[:2] != (batch, rows) or dtype_of(node) is not torch.float32:
        return "the residual sum is not [batch, tokens, channels] in float32"
    return node


def read_by_position(program: Program) -> int:
    """Return the number of tokens at the front of streams that are selected by their position, or stand apart from the others."""
    lengths, front = {s.tokens for s in streams(program)[0]}, 0
    for node in program.calls(aten.select.int, aten.slice.Tensor):
        source = node.args[0]
        if len(node.args) < 3 or program.constant(source) is not None:
            continue
        if shape_of(source)[node.args[1]] not in lengths or node.args[1] % len(shape_of(source)) == 0:
            continue
        start, end = node.args[2], node.args[3] if len(node.args) > 3 else 1 << 62
        split = start + 1 if node.target is aten.select.int else start if start else end
        if 0 < split <= MAX_FRONT:
            front = max(front, split)
    return front
