"""``thresher::kth_largest(x, k)``: the k-th largest element of each row, x [..., N] -> [..., 1].

With ``thresher::shrink`` it is top-k. NaN counts as the largest, as in ``torch.topk``.
"""

from __future__ import annotations

from torch import Tensor

from thresher.ops.define import define


def _reference(x: Tensor, k: int) -> Tensor:
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"thresher::kth_largest: k = {k} of {x.shape[-1]} elements")
    return x.topk(k, -1).values[..., -1:].clone()


define("kth_largest", "(Tensor x, int k) -> Tensor", _reference, lambda x, k: x.new_empty(*x.shape[:-1], 1))
