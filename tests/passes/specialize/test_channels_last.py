"""channels-last: the same function in float64, and permutations only at the border of the image part."""

from __future__ import annotations

import pytest
import torch

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.rewrites import check_rewrite
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.testing import ZOO, settle

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
    manager = PassManager(pipelines.specialize, "each")
    result = manager.run(program)
    (record,) = (r for r in manager.records if r.name == "channels-last")
    assert record.status == "changed" and record.error < 1e-9
    assert not list(result.calls(torch.ops.aten.conv2d.default))
    if IMAGES[name] is not None:
        assert len(list(result.calls(torch.ops.aten.permute.default))) == IMAGES[name]


class Single(torch.nn.Module):
    """A batch through a convolution, then one image without a batch dimension through two pools and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.max_pool2d(self.a(x)[0], 2)
        return torch.nn.functional.adaptive_avg_pool2d(self.b(y), 2)


def test_single_images_stay_as_they_are() -> None:
    """Three dimensions are a sequence to conv1d, and an image without a batch to conv2d: that one is left alone, the rest is not."""
    program = capture(Single().eval(), (torch.randn(2, 3, 14, 14),))
    manager = PassManager(pipelines.specialize, "each")
    result = manager.run(program)
    (record,) = (r for r in manager.records if r.name == "channels-last")
    assert record.status == "changed" and record.error < 1e-9
    assert len(list(result.calls(torch.ops.thresher.conv2d_nhwc.default))) == 1
    assert len(list(result.calls(torch.ops.aten.conv2d.default))) == 1


BEFORE = """\
program model {
  %x = input : f32[1, 3, 6, 6]
  %weight = constant "weight" : f32[4, 3, 3, 3]
  %conv = aten.conv2d.default(%x, %weight) : f32[1, 4, 4, 4]
  %y = aten.relu.default(%conv) : f32[1, 4, 4, 4]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[1, 3, 6, 6]
  %weight = constant "weight" : f32[4, 3, 3, 3]
  %permute = aten.permute.default(%x, [0, 2, 3, 1]) : f32[1, 6, 6, 3]
  %conv2d_nhwc = thresher.conv2d_nhwc.default(%permute, %weight, None, [1, 1], [0, 0], [1, 1], 1) : f32[1, 4, 4, 4]
  %relu = aten.relu.default(%conv2d_nhwc) : f32[1, 4, 4, 4]
  %permute_1 = aten.permute.default(%relu, [0, 3, 1, 2]) : f32[1, 4, 4, 4]
  return [%permute_1]
}
"""


def test_before_and_after() -> None:
    check_rewrite("channels-last", BEFORE, AFTER)


SEQUENCE = """\
program model {
  %x = input : f32[2, 3, 13]
  %weight = constant "weight" : f32[4, 3, 3]
  %conv = aten.conv1d.default(%x, %weight, None, [2], [1], [2]) : f32[2, 4, 6]
  %max = aten.max_pool1d.default(%conv, [3], [1], [1]) : f32[2, 4, 6]
  %mean = aten.avg_pool1d.default(%max, [2], [2]) : f32[2, 4, 3]
  %up = constant "up" : f32[4, 4, 2]
  %y = aten.conv_transpose1d.default(%mean, %up, None, [3], [0], [1]) : f32[2, 4, 9]
  return [%y]
}
"""
SEQUENCE_AFTER = """\
program model {
  %x = input : f32[2, 3, 13]
  %weight = constant "weight" : f32[4, 3, 1, 3]
  %up = constant "up" : f32[4, 4, 1, 2]
  %permute = aten.permute.default(%x, [0, 2, 1]) : f32[2, 13, 3]
  %image = aten.unsqueeze.default(%permute, 1) : f32[2, 1, 13, 3]
  %conv = thresher.conv2d_nhwc.default(%image, %weight, None, [1, 2], [0, 1], [1, 2], 1) : f32[2, 1, 6, 4]
  %max = thresher.max_pool2d_nhwc.default(%conv, [1, 3], [1, 1], [0, 1], [1, 1], False) : f32[2, 1, 6, 4]
  %mean = thresher.avg_pool2d_nhwc.default(%max, [1, 2], [1, 2], [0, 0], False, True, None) : f32[2, 1, 3, 4]
  %y = thresher.conv_transpose2d_nhwc.default(%mean, %up, None, [1, 3], [0, 0], [0, 1], 1, [1, 1]) : f32[2, 1, 9, 4]
  %squeeze = aten.squeeze.dims(%y, [1]) : f32[2, 9, 4]
  %first = aten.permute.default(%squeeze, [0, 2, 1]) : f32[2, 4, 9]
  return [%first]
}
"""


def test_a_sequence_is_an_image_of_height_1() -> None:
    """Whatever a kernel of height 1 may do along the height, it does nothing there."""
    check_rewrite("channels-last", SEQUENCE, SEQUENCE_AFTER)


ONE_NUMBER = """\
program model {
  %x = input : f32[2, 3, 6, 6]
  %max = aten.max_pool2d.default(%x, [2], [], [1]) : f32[2, 3, 4, 4]
  %slice = aten.slice.Tensor(%max, start=1) : f32[1, 3, 4, 4]
  %mean = aten.mean.dim(%slice, 3, True) : f32[1, 3, 4, 1]
  return [%mean]
}
"""
EACH_DIMENSION = """\
program model {
  %x = input : f32[2, 3, 6, 6]
  %permute = aten.permute.default(%x, [0, 2, 3, 1]) : f32[2, 6, 6, 3]
  %max = thresher.max_pool2d_nhwc.default(%permute, [2, 2], [2, 2], [1, 1], [1, 1], False) : f32[2, 4, 4, 3]
  %slice = aten.slice.Tensor(%max, 0, start=1) : f32[1, 4, 4, 3]
  %mean = aten.mean.dim(%slice, [2], True) : f32[1, 4, 1, 3]
  %first = aten.permute.default(%mean, [0, 3, 1, 2]) : f32[1, 3, 4, 1]
  return [%first]
}
"""


def test_one_number_stands_for_all_dimensions() -> None:
    """And a slice without a dimension is one of the first."""
    check_rewrite("channels-last", ONE_NUMBER, EACH_DIMENSION)
