"""permute-channels: the order of a coupled set is free, where nothing gives places a meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.folds import IMAGE, Net, kill
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.passes.fold.permute_channels import PermuteChannels
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

aten = torch.ops.aten


def permuted(model: nn.Module) -> tuple[Program, Program]:
    program = PassManager(pipelines.canonicalize, "off").run(capture(model.eval(), (torch.randn(*IMAGE),)))
    result = PermuteChannels(min_improvement=0.0).apply(program, Context()).program.verify()
    assert not compare_programs(observe(program), result).exceeds(EXACT_TOLERANCE)
    return program, result


def residual(s: Net, x: Tensor) -> Tensor:
    return s.c(F.relu(s.a(x) + s.b(x)))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "a": nn.Conv2d(3, 8, 1, bias=False),
        "b": nn.Conv2d(3, 8, 3, padding=1, bias=False),
        "c": nn.Conv2d(8, 4, 1),
    }


def test_a_one_sided_branch_becomes_a_range() -> None:
    """b saves more than a (9 taps): its dead channels come last, and the narrow branch is padded, not gathered."""
    net = Net(residual, **layers())
    kill(net.a.weight, 2)
    kill(net.b.weight, 1, 4, 6)
    program, result = permuted(net)
    dead = (result.constants["b.weight"] == 0).flatten(1).all(1)
    assert dead.tolist() == [False] * 5 + [True] * 3
    folded = FoldChannels(min_improvement=0.0, round_to=1).apply(result, Context()).program
    assert tuple(folded.constants["b.weight"].shape) == (5, 3, 3, 3)
    assert any(True for _ in folded.calls(aten.constant_pad_nd.default))
    without = FoldChannels(min_improvement=0.0, round_to=1).apply(program, Context()).program
    assert any(True for _ in without.calls(aten.index_select.default))
    assert PermuteChannels(min_improvement=0.0).apply(result, Context()).rewrites == []


def test_groups_keep_their_order() -> None:
    """The channels of a group norm or a grouped convolution belong to their groups."""
    net = Net(
        lambda s, x: s.c(s.g(s.n(s.a(x) + s.b(x)))), n=nn.GroupNorm(2, 8), g=nn.Conv2d(8, 8, 1, groups=2), **layers()
    )
    kill(net.b.weight, 1, 4, 6)
    program, result = permuted(net)
    assert result is program


def test_outputs_keep_their_order() -> None:
    net = Net(lambda s, x: s.a(x) + s.b(x), **{k: v for k, v in layers().items() if k != "c"})
    kill(net.b.weight, 1, 4)
    program, result = permuted(net)
    assert result is program


def test_only_where_it_could_pay() -> None:
    """Eight channels of an 8 x 8 image are computed sooner than moved."""
    net = Net(residual, **layers())
    kill(net.b.weight, 1, 4, 6)
    program = capture(net.eval(), (torch.randn(*IMAGE),))
    assert PermuteChannels().apply(program, Context()).program is program


BEFORE = """\
program model {
  %x = input : f32[2, 3]
  %first = constant "first" : f32[4, 3]
  %branch = constant "branch" : f32[4, 3]
  %last = constant "last" : f32[2, 4]
  %a = aten.linear.default(%x, %first, None) : f32[2, 4]
  %b = aten.linear.default(%x, %branch, None) : f32[2, 4]
  %sum = aten.add.Tensor(%a, %b) : f32[2, 4]
  %y = aten.linear.default(%sum, %last, None) : f32[2, 2]
  return [%y]
}
"""
AFTER = BEFORE  # the numbers of constants change


def test_before_and_after() -> None:
    result = check_rewrite(
        "permute-channels{min_improvement=0}",
        BEFORE,
        AFTER,
        constants={"branch": torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None].repeat(1, 3)},
    )
    assert (result.constants["branch"] != 0).any(1).tolist() == [True, True, False, False]
