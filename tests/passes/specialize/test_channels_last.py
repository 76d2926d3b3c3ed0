"""channels-last: the same function in float64, and permutations only at the border of the image part."""

from __future__ import annotations

import pytest
import torch
from conftest import ZOO, settle

from thresher.capture import capture
from thresher.pass_manager import PassManager
from thresher.passes import pipelines

IMAGES = {
    "mobilenet": 1,
    "resnet18": 1,
    "unet": 4,
    "vit": None,
}  # permutations left: input, and for U-Net output and two upsamplings


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_exact_and_at_the_border_only(name: str) -> None:
    model, args = ZOO[name]()
    program = PassManager(pipelines.exact, "off").run(capture(settle(model), args))
    manager = PassManager(pipelines.specialize_cpu, "each")
    result = manager.run(program)
    assert manager.records[-1].status == "changed" and manager.records[-1].error < 1e-9
    assert not list(result.calls(torch.ops.aten.conv2d.default))
    if IMAGES[name] is not None:
        assert len(list(result.calls(torch.ops.aten.permute.default))) == IMAGES[name]
