"""Types of arguments: the values that their texts stand for. What they refuse is in test_main.py."""

from __future__ import annotations

import torch

from thresher import Budget
from thresher.cli import arguments
from thresher.tuning.options import Remote


def test_inputs() -> None:
    x = arguments.input_tensor("2x3")
    assert x.shape == (2, 3) and x.dtype is torch.float32 and torch.equal(x, arguments.input_tensor("2x3"))
    assert arguments.input_tensor("2:float16").dtype is torch.float16
    assert torch.equal(arguments.input_tensor("4:int64"), torch.zeros(4, dtype=torch.int64))


def test_passes() -> None:
    assert arguments.passes("exact") == ["exact"]
    assert arguments.passes("exact; simplify;") == ["exact", "simplify"]
    assert arguments.passes("a{x='1;2'};b{y=3}") == ["a{x='1;2'}", "b{y=3}"]
    assert arguments.passes("") == []


def test_values_with_separators() -> None:
    assert arguments.budget("cosine=0.01") == Budget(cosine=0.01)
    assert arguments.remote("10.0.0.1:9190:board") == Remote("10.0.0.1", 9190, "board")
    assert arguments.named_numbers("sr=16000") == ("sr", 16000)
    assert arguments.named_numbers("shape=1,-1") == ("shape", [1, -1])
    assert arguments.named_numbers("k=5,") == ("k", [5]) and arguments.named_numbers("s=0.5") == ("s", 0.5)
    assert arguments.named_artifact("prefill=a=b.thresher") == ("prefill", "a=b.thresher")
    assert arguments.batch_sizes("1,8") == (1, 8)
    assert arguments.removed_index("relu:1:7") == ("relu", 1, 7)
