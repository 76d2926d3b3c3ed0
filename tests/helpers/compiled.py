"""A model whose kernels are compared with torch in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import thresher
from thresher.verification.compare import compare


def compiled_and_equal(model: nn.Module, *args: Tensor, tolerance: float) -> thresher.Compiled:
    """Compile ``model`` as it is, for one result; its error relative to the model in float64 is below ``tolerance``."""
    compiled = thresher.compile(model.eval(), args, target="cpu", passes="none", validate="off")
    with torch.no_grad():
        expected = model.double()(*(a.double() for a in args)).float()
        assert compare([expected], [compiled(*args)]).relative < tolerance
    return compiled
