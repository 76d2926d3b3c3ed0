"""The linear layers whose zeros can be skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from thresher.ir.nodes import dtype_of, shape_of
from thresher.ir.program import Program


def layers_of_constants(program: Program, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> Iterator[fx.Node]:
    """Yield the linear layers with constant, finite weights (0 times infinity is no 0) and static shapes, of two dimensions or more."""
    for node in program.calls(torch.ops.aten.linear.default):
        weight = program.constant(node.args[1])
        static = all(isinstance(d, int) for d in (*shape_of(node), *shape_of(node.args[0])))
        if weight is None or not static or dtype_of(node) not in dtypes or len(shape_of(node)) < 2:
            continue
        if bool(torch.isfinite(weight).all()):
            yield node
