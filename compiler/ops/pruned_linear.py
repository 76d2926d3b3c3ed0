"""``thresher::pruned_linear(x, W, b, layout)``: a linear layer whose weight is full of zeros, which are neither stored nor multiplied.

    y_n = sum over the k with W_nk != 0 of x_k W_nk + b_n

x [..., K], W [N, K]. The same as linear for finite inputs (0 times infinity is not computed). ``layout`` says how a compiler should keep
the weight; it does not change the result:

    rows      of each output its inputs                         whatever was pruned; N:M
    panels    of groups of outputs the inputs of any of them    blocks of 16 x 1, 32 x 32
    runs      of each output runs of neighbouring inputs        blocks of 1 x 16
"""

from __future__ import annotations

from torch import Tensor

from thresher.ops.define import define
from thresher.ops.sparse_linear import dense_linear

LAYOUTS = ("rows", "panels", "runs")


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, layout: str) -> Tensor:
    if layout not in LAYOUTS:
        raise ValueError(f"thresher::pruned_linear: unknown layout {layout!r}; one of {', '.join(LAYOUTS)}")
    return dense_linear(x, weight, bias)


define(
    "pruned_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str layout) -> Tensor",
    _reference,
    lambda x, weight, bias, layout: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
