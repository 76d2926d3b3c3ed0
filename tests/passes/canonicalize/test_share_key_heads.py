"""Keys that are repeated for groups of query heads are stored once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from helpers.masked_attention import SDPA, passed, qkv
from helpers.rewrites import check_rewrite


def test_repeated_key_heads_are_shared() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (t[:, :, None].expand(1, 2, 3, 20, 8).reshape(1, 6, 20, 8) for t in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

    q, (_, k, v) = qkv(20, 20, 6)[0], qkv(20, 20)
    (node,) = passed(Grouped(), q, k, v).calls(SDPA)
    assert node.kwargs["enable_gqa"] and node.args[1].op == "placeholder"


BEFORE = """\
program model {
  %q = input : f32[1, 6, 5, 4]
  %k = input : f32[1, 2, 5, 4]
  %one = aten.unsqueeze.default(%k, 2) : f32[1, 2, 1, 5, 4]
  %three = aten.expand.default(%one, [1, 2, 3, 5, 4]) : f32[1, 2, 3, 5, 4]
  %heads = aten.reshape.default(%three, [1, 6, 5, 4]) : f32[1, 6, 5, 4]
  %y = aten.scaled_dot_product_attention.default(%q, %heads, %heads) : f32[1, 6, 5, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %q = input : f32[1, 6, 5, 4]
  %k = input : f32[1, 2, 5, 4]
  %y = aten.scaled_dot_product_attention.default(%q, %k, %k, enable_gqa=True) : f32[1, 6, 5, 4]
  return [%y]
}
"""


def test_before_and_after() -> None:
    check_rewrite("share-key-heads", BEFORE, AFTER)
