"""-(-x) is x.

neg(neg(x))  ->  x
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from thresher.authoring import Context, Note, Pass, PassResult, Program, is_tensor, register_pass

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class DropDoubleNegation(Pass):
    """Remove two negations in a row."""

    name: ClassVar[str] = "drop-double-negation"
    target_ops: ClassVar[tuple] = (aten.neg.default,)
    limit: int = 1000  # rewrites at most

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(aten.neg.default)):
            inner = node.args[0]
            if is_tensor(inner) and inner.target is aten.neg.default and len(notes) < self.limit:
                notes.append(Note.at(node, f"the negative of {inner.name}, which is one"))
                node.replace_all_uses_with(inner.args[0])
        return PassResult(work.clean(), notes) if notes else PassResult(program)
