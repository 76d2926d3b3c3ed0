"""Keys and values that are repeated for groups of query heads are stored once, and the attention says that its heads share them.

    attention(q, repeat(k, g), repeat(v, g)) = attention(q, k, v, enable_gqa=True)        (grouped queries: Ainslie et al., 2023)

The repetition is spelled unsqueeze, expand, reshape (transformers) or ``repeat_interleave``, which is exported the same way. Keys and
values must both be repeated, [B, G, S, E] to [B, H, S, E] with each of the G heads next to its copies, and have the same G; other
attentions, and those that share heads already, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from thresher.analysis.slices.transfer.base import argument
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.pattern import aten
from thresher.rewriting.registry import register_pass

SDPA = aten.scaled_dot_product_attention.default


@register_pass
@dataclass(frozen=True)
class ShareKeyHeads(Pass):
    """Drop the repetition of keys and values for groups of query heads."""

    name: ClassVar[str] = "share-key-heads"
    requires: ClassVar[tuple[str, ...]] = ("canonicalize-attention",)
    target_ops: ClassVar[tuple] = (SDPA,)

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in work.calls(SDPA):
            q, *repeated = node.args[:3]
            k, v = (_before_repetition(n) for n in repeated)
            if k is None or v is None or shape_of(k)[1] != shape_of(v)[1] or argument(node, 7, "enable_gqa", False):
                continue
            if any(shape_of(q)[1] != shape_of(n)[1] for n in repeated):  # one of them is broadcast
                continue
            node.args = (q, k, v, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            notes.append(Note.at(node, f"{shape_of(node)[1]} query heads share {shape_of(k)[1]} key heads"))
        return PassResult(work.clean(), notes) if notes else PassResult(program)


def _before_repetition(node: fx.Node) -> fx.Node | None:
    """Return the value [B, G, S, E] that ``node`` [B, H, S, E] repeats for each of H / G heads, or None."""
    if node.target is not aten.reshape.default or node.args[0].target is not aten.expand.default:
        return None
    wide = node.args[0]
    narrow = wide.args[0]
    if len(shape_of(wide)) != 5 or narrow.target not in (aten.unsqueeze.default, aten.reshape.default):
        return None
    source, (b, g, _, s, e) = narrow.args[0], shape_of(wide)
    if shape_of(narrow) != (b, g, 1, s, e) or shape_of(source) != (b, g, s, e):
        return None
    return source if shape_of(node) == (b, shape_of(wide)[1] * shape_of(wide)[2], s, e) else None
