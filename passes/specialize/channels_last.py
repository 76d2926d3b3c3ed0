"""Choose channels-last activations for the image part of the graph, once.

    conv(x [N, C, H, W])  =  to_first(conv_nhwc(to_last(x)))        to_last: [N, C, H, W] -> [N, H, W, C]; to_first: its inverse

Permutations that meet cancel, so they stand only at the border of the region that works on channels-last values: from the first convolution
or pool on, through resizes, elementwise operators, concatenation, padding, reductions, and reshapes that flatten pixels to tokens. A
sequence ``[N, C, L]`` is an image of height 1, ``[N, 1, L, C]``; a volume ``[N, C, D, H, W]`` becomes ``[N, D, H, W, C]``. Exact: an
axis is renamed, nothing is computed differently. An operator that has no rule (``_channels_last_rules.py``), a convolution whose weight
is computed, and one without a batch dimension read the value as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from thresher.ir.program import Program
from thresher.passes.specialize._channels_last_rules import rewrite
from thresher.passes.specialize._twins import Layout
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass


@register_pass
@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Run the image part of the graph on channels-last activations."""

    name: ClassVar[str] = "channels-last"
    keeps_copies: ClassVar[bool] = True

    def apply(self, program: Program, context: Context) -> PassResult:
        layout = Layout(program.clone())
        nodes = list(layout.program.calls())
        notes = [Note.at(n, "on channels-last activations") for n in nodes if rewrite(layout, n)]
        if not notes:
            return PassResult(program)
        layout.back_to_first()
        return PassResult(layout.program.clean(), notes)
