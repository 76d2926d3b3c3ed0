"""Torch's own kernels (oneDNN, MKL) as candidates: an operator that torch computes, called from the compiled code.

They are taken only where tuning found one faster, with ``library="auto"``, and only for operators with arithmetic: the call costs
several microseconds, and what follows is no longer part of the kernel.
"""

from __future__ import annotations

import torch
from torch import fx

from thresher.analysis.cost.cost import COUNTERS
from thresher.ir.nodes import dtype_of, is_tensor, shape_of


def possible(node: fx.Node) -> bool:
    """Return whether torch may compute ``node``: arithmetic on float32 of known shapes."""
    tensors = [node, *node.all_input_nodes]
    return (
        node.target in COUNTERS
        and all(is_tensor(t) and all(isinstance(d, int) for d in shape_of(t)) for t in tensors)
        and dtype_of(node) is torch.float32
    )
