"""merge-duplicates: equal channels are read once, and the fold removes the others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.folds import Net, fold, shapes
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.passes.fold.merge_duplicates import MergeDuplicates
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager


def copy_rows(layer: nn.Module, pairs: dict[int, int]) -> None:
    with torch.no_grad():
        for target, source in pairs.items():
            layer.weight[target] = layer.weight[source]
            if layer.bias is not None:
                layer.bias[target] = layer.bias[source]


def test_hidden_units() -> None:
    net = Net(lambda s, x: s.b(F.gelu(s.a(x))), a=nn.Linear(6, 8), b=nn.Linear(8, 4))
    copy_rows(net.a, {3: 1, 5: 1, 7: 0})
    folded, _ = fold(net, torch.randn(3, 6))
    assert shapes(folded)["a.weight"] == (5, 6)
    assert shapes(folded)["b.weight"] == (4, 5)


def test_channels_through_a_norm_a_pool_and_two_readers() -> None:
    """Equal filters with equal batch norms are equal; with other ones they are not."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = F.max_pool2d(s.n(s.a(x)).relu(), 2)
        return s.b(y) + s.c(y)

    net = Net(forward, a=nn.Conv2d(3, 8, 3, padding=1), n=nn.BatchNorm2d(8), b=nn.Conv2d(8, 4, 3), c=nn.Conv2d(8, 4, 3))
    copy_rows(net.a, {3: 1, 6: 2})
    with torch.no_grad():
        net.n.running_mean[6] = 0.5  # 6 is no copy of 2 any more
    folded, _ = fold(net, torch.randn(2, 3, 10, 10))
    assert sorted(s for s in shapes(folded).values() if len(s) == 4) == [(4, 7, 3, 3), (4, 7, 3, 3), (7, 3, 3, 3)]


def test_a_product_of_duplicates_by_different_constants_is_none() -> None:
    scale = torch.tensor([1.0, 2.0, 1.0, 1.0])
    net = Net(lambda s, x: s.b(s.a(x) * scale), a=nn.Linear(6, 4), b=nn.Linear(4, 4))
    copy_rows(net.a, {1: 0, 3: 2})
    folded, _ = fold(net, torch.randn(3, 6))
    assert (3, 6) in shapes(folded).values()  # the constants are in the weight now: two rows are still equal


def test_nothing_to_merge() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=nn.Linear(6, 4), b=nn.Linear(4, 4))
    program = PassManager(pipelines.canonicalize, "off").run(capture(net.eval(), (torch.randn(3, 6),)))
    result = MergeDuplicates().apply(program, Context())
    assert result.program is program
    assert result.rewrites == []


def test_again_changes_nothing() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=nn.Linear(6, 4), b=nn.Linear(4, 4))
    copy_rows(net.a, {1: 0})
    program = PassManager(pipelines.canonicalize, "off").run(capture(net.eval(), (torch.randn(3, 6),)))
    once = MergeDuplicates().apply(program, Context())
    assert len(once.rewrites) == 1
    assert MergeDuplicates().apply(once.program, Context()).rewrites == []


BEFORE = """\
program model {
  %x = input : f32[2, 3]
  %first = constant "first" : f32[4, 3]
  %second = constant "second" : f32[2, 4]
  %a = aten.linear.default(%x, %first, None) : f32[2, 4]
  %b = aten.relu.default(%a) : f32[2, 4]
  %y = aten.linear.default(%b, %second, None) : f32[2, 2]
  return [%y]
}
"""
AFTER = BEFORE  # the numbers of constants change


def test_before_and_after() -> None:
    result = check_rewrite(
        "merge-duplicates",
        BEFORE,
        AFTER,
        constants={"first": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [1.0, 2.0, 3.0], [7.0, 8.0, 9.0]])},
    )
    assert (result.constants["second"] != 0).any(0).tolist() == [True, True, False, True]  # nobody reads the copy
