"""Resize, in all its modes, against the reference that ONNX ships."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from helpers.onnx_cases import one_node, run

COORDINATES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]
SCALES = [(2.0, 2.0), (1.3, 0.7), (0.5, 3.0)]
X = np.random.default_rng(0).standard_normal((1, 2, 5, 7)).astype(np.float32)


def check(inputs: list, **attributes: object) -> None:
    """The result is the reference's; all inputs but the first are constants."""
    constants = {i: v for i, v in enumerate(inputs) if i and v is not None}
    model = one_node("Resize", inputs, constants, 1, 19, **attributes)
    (expected,) = ReferenceEvaluator(model).run(None, {"x0": inputs[0]})
    torch.testing.assert_close(
        run(model, torch.from_numpy(inputs[0])), torch.from_numpy(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("coordinates", "scales"), itertools.product(COORDINATES, SCALES), ids=str)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_interpolation(mode: str, coordinates: str, scales: tuple) -> None:
    """A factor that does not divide the size is used as it is stated, and not as the ratio of the sizes."""
    factors = np.array([1, 1, *scales], np.float32)
    check([X, None, factors], mode=mode, coordinate_transformation_mode=coordinates)
    check([X, None, factors], mode=mode, coordinate_transformation_mode=coordinates, exclude_outside=1)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", [(0.6, 0.4), (0.5, 0.5)])
def test_antialiasing(mode: str, scales: tuple) -> None:
    check([X, None, np.array([1, 1, *scales], np.float32)], mode=mode, antialias=1)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize(("coordinates", "scales"), itertools.product(COORDINATES, SCALES), ids=str)
def test_nearest(rounding: str, coordinates: str, scales: tuple) -> None:
    factors = np.array([1, 1, *scales], np.float32)
    check([X, None, factors], mode="nearest", nearest_mode=rounding, coordinate_transformation_mode=coordinates)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
def test_sizes_of_some_axes(policy: str) -> None:
    check([X, None, None, np.array([9, 4])], mode="linear", axes=[3, 2], keep_aspect_ratio_policy=policy)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_a_region(mode: str) -> None:
    region = np.array([0, 0, 0.1, 0.2, 1, 1, 1.3, 0.9], np.float32)
    attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    check([X, region, None, np.array([1, 2, 4, 3])], **attributes)
