"""Batch norm moves into the layer before it, else after it, else it is one product and one sum."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.canonical import canonical
from thresher.passes import pipelines


@pytest.mark.parametrize(
    ("model", "shape", "left"),
    [
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 7, 7), 1),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 7), 1),
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), (2, 3, 7, 7), 1),
        (nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8)), (5, 6), 1),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)), (2, 3, 7, 7), 3),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), (2, 3, 7, 7), 3),
    ],
)
def test_batch_norm_folds(model: nn.Module, shape: tuple[int, ...], left: int) -> None:
    """Into the layer before, else into the layer after where no padding shows, else into one mul and one add."""
    from thresher.testing import settle

    program, _ = canonical(settle(model), torch.randn(shape), passes=[*pipelines.canonicalize, "fold-batch-norm"])
    assert len(list(program.calls())) == left
