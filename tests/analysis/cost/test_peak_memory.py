"""The most that values live at one time take."""

from __future__ import annotations

import torch
from torch import nn

from helpers.modules import Function
from thresher.analysis.cost.peak_memory import Peak, peak_bytes, peak_of
from thresher.frontend.capture import capture


def test_values_live_until_their_last_use() -> None:
    program = capture(Function(lambda x: (x.exp().sin() + x).sum()), (torch.randn(100),))
    assert peak_bytes(program) == 3 * 400  # x, one value and the next
    assert peak_of(program, wide=True).bytes == 3 * 800


def test_the_largest_value_is_named() -> None:
    program = capture(Function(lambda x: (x[:, None] * x[None]).sum(1)), (torch.randn(64),))
    peak = peak_of(program)
    assert peak.largest is not None and peak.largest.target is torch.ops.aten.mul.Tensor
    assert peak.bytes >= 64 * 64 * 4


def test_a_reference_run_copies_the_weights_it_uses() -> None:
    program = capture(nn.Linear(64, 32, bias=False), (torch.randn(1, 64),))
    inputs, outputs, weight = 64, 32, 64 * 32
    assert peak_of(program).bytes == 4 * (inputs + outputs)
    wide = peak_of(program, wide=True)
    assert wide.bytes == 8 * (inputs + outputs + weight)
    assert wide.largest is not None and wide.largest.op == "get_attr"


def test_views_take_nothing_and_what_nobody_reads_is_freed() -> None:
    program = capture(Function(lambda x: x.reshape(10, 10).permute(1, 0)), (torch.randn(100),))
    assert peak_of(program) == Peak(400)
