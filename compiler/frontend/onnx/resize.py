"""ONNX's Resize in torch: one axis after the other, each by torch's own operator where that computes the same, else by weights.

an element of the result = the sum of elements of x near its position, times weights that depend on how near they are
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Floats, Ints, rule
from thresher.frontend.onnx.values import Unsupported


@dataclass(frozen=True)
class Method:
    """The attributes of Resize that say how elements are weighted."""

    mode: str
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic_coefficient: float = -0.75
    exclude_outside: bool = False
    extrapolation: float = 0.0
    antialias: bool = False


@dataclass(frozen=True)
class Axis:
    """A dimension, its old and its new size, the factor between them, and the part of it that is cropped."""

    dim: int
    old: int
    new: int
    scale: float
    crop: tuple[float, float] = (0.0, 1.0)

    @property
    def unchanged(self) -> bool:
        """Nothing is resized or cropped."""
        return self.old == self.new and math.isclose(self.scale, 1.0) and self.crop == (0.0, 1.0)


@rule("Resize", since=11)
def resize(
    x: Tensor,
    region: Floats | None = None,
    scales: Floats | None = None,
    sizes: Ints | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str,
    cubic_coeff_a: float,
    exclude_outside: int,
    extrapolation_value: float,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str,
    nearest_mode: str,
) -> Tensor:
    """Return x in other sizes."""
    dims = [a % x.dim() for a in axes] if axes is not None else list(range(x.dim()))
    method = Method(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), extrapolation_value, bool(antialias)
    )  # fmt: skip
    crops = [(0.0, 1.0)] * len(dims)
    if coordinate_transformation_mode == "tf_crop_and_resize":
        if not region:
            raise Unsupported("tf_crop_and_resize without a region")
        crops = list(zip(region[: len(dims)], region[len(dims) :]))
    old = [int(x.shape[d]) for d in dims]
    if sizes:
        new, factors = _of_policy(old, sizes, keep_aspect_ratio_policy)
    elif scales:
        new, factors = [math.floor(o * f) for o, f in zip(old, scales)], list(scales)
    else:
        raise Unsupported("neither scales nor sizes")
    return _resized(x, [Axis(*values) for values in zip(dims, old, new, factors, crops)], method)


@rule("Resize", "Upsample", since=9)
def upsample(x: Tensor, scales: Floats, *, mode: str) -> Tensor:
    """Return x in other sizes: the elements begin at the same corner."""
    new = [math.floor(int(o) * f) for o, f in zip(x.shape, scales)]
    axes = [Axis(d, int(o), n, f) for d, (o, n, f) in enumerate(zip(x.shape, new, scales))]
    return _resized(x, axes, Method({"bilinear": "linear"}.get(mode, mode), "asymmetric", "floor"))


@rule("Upsample", since=7)
def upsample_by_attribute(x: Tensor, *, mode: str, scales: Sequence[float]) -> Tensor:
    """Return x in other sizes: the elements begin at the same corner."""
    return upsample(x, scales, mode=mode)


def _of_policy(old: Sequence[int], sizes: Sequence[int], policy: str) -> tuple[list[int], list[float]]:
    """Return sizes and factors: as stated, or all by the smallest or the largest of the factors."""
    factors = [n / o for n, o in zip(sizes, old)]
    if policy == "stretch":
        return list(sizes), factors
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [int(factor * o + 0.5) for o in old], [factor] * len(old)


def _resized(x: Tensor, axes: Sequence[Axis], method: Method) -> Tensor:
    axes = [a for a in axes if not a.unchanged]
    if method.mode not in ("nearest", "linear", "cubic"):
        raise Unsupported(f"the mode {method.mode}")
    if not axes:
        return x
    by_torch = _by_torch(x, axes, method)
    if by_torch is not None:
        return by_torch
    floating = x if x.is_floating_point() or method.mode == "nearest" else x.to(torch.float64)
    for axis in axes:
        floating = _along(floating, axis, method)
    if floating.dtype == x.dtype:
        return floating
    limits = torch.iinfo(x.dtype)
    return floating.clamp(limits.min, limits.max).to(x.dtype)


def _by_torch(x: Tensor, axes: Sequence[Axis], method: Method) -> Tensor | None:
    """Return the result of F.interpolate where it is the same, else None."""
    spatial = x.dim() - 2
    if spatial not in (1, 2, 3) or min(a.dim for a in axes) < 2 or not x.is_floating_point():
        return None
    size = [int(s) for s in x.shape[2:]]
    for axis in axes:
        size[axis.dim - 2] = axis.new
    if not all(math.isclose(a.scale * a.old, a.new) for a in axes) or method.antialias or method.exclude_outside:
        return None
    if method.mode == "nearest":
        same = all((_nearest_index(a, method) == np.arange(a.new) * a.old // a.new).all() for a in axes)
        return F.interpolate(x, size, mode="nearest") if same and method.coordinates != "tf_crop_and_resize" else None
    half_pixel = method.coordinates == "half_pixel" or (
        method.coordinates == "pytorch_half_pixel" and all(a.new > 1 for a in axes)
    )
    corners = method.coordinates == "align_corners" and all(a.new > 1 for a in axes)
    if not (half_pixel or corners):
        return None
    if method.mode == "linear":
        return F.interpolate(x, size, mode=("linear", "bilinear", "trilinear")[spatial - 1], align_corners=corners)
    if spatial == 2 and method.cubic_coefficient == -0.75:
        return F.interpolate(x, size, mode="bicubic", align_corners=corners)
    return None


def _along(x: Tensor, axis: Axis, method: Method) -> Tensor:
    """Return x in another size along one axis."""
    if method.mode == "nearest":
        result = x.index_select(axis.dim, torch.from_numpy(_nearest_index(axis, method)))
    else:
        weights = torch.from_numpy(_weights(axis, method)).to(x.dtype)
        result = torch.matmul(x.transpose(axis.dim, -1), weights.mT).transpose(axis.dim, -1)
    if method.coordinates != "tf_crop_and_resize":
        return result
    position = _positions(axis, method)
    outside = torch.from_numpy((position < 0) | (position > axis.old - 1))
    return torch.where(outside.reshape(-1, *[1] * (x.dim() - 1 - axis.dim)), method.extrapolation, result)


def _positions(axis: Axis, method: Method) -> np.ndarray:
    """Return for each element of the result its position among those of x."""
    index, whole = np.arange(axis.new, dtype=np.float64), axis.scale * axis.old
    half_pixel = (index + 0.5) / axis.scale - 0.5
    if method.coordinates == "half_pixel":
        return half_pixel
    if method.coordinates == "half_pixel_symmetric":
        # added in the order of the reference: a last bit decides where a position is rounded down
        return axis.old / 2 * (1 - axis.new / whole) + (index + 0.5) / axis.scale - 0.5
    if method.coordinates == "pytorch_half_pixel":
        return half_pixel if whole != 1 else np.full(axis.new, -0.5)
    if method.coordinates == "tf_half_pixel_for_nn":
        return (index + 0.5) / axis.scale
    if method.coordinates == "asymmetric":
        return index / axis.scale
    if method.coordinates == "align_corners":
        return index * (axis.old - 1) / (whole - 1) if whole != 1 else np.zeros(axis.new)
    if method.coordinates == "tf_crop_and_resize":
        start, width = axis.crop[0] * (axis.old - 1), (axis.crop[1] - axis.crop[0]) * (axis.old - 1)
        return start + index * width / (whole - 1) if whole != 1 else np.full(axis.new, start + width / 2)
    raise Unsupported(f"the coordinates {method.coordinates}")


def _nearest_index(axis: Axis, method: Method) -> np.ndarray:
    position = _positions(axis, method)
    roundings = {
        "floor": np.floor(position), "ceil": np.ceil(position), "round_prefer_floor": np.ceil(position - 0.5),
        "round_prefer_ceil": np.floor(position + 0.5),
    }  # fmt: skip
    if method.nearest not in roundings:
        raise Unsupported(f"the rounding {method.nearest}")
    return np.clip(roundings[method.nearest], 0, axis.old - 1).astype(np.int64)


def _weights(axis: Axis, method: Method) -> np.ndarray:
    """Return the matrix [new, old] of one axis; elements beyond the edge are the one at the edge."""
    position = _positions(axis, method)
    stretch = min(axis.scale, 1.0) if method.antialias else 1.0
    reach = (1 if method.mode == "linear" else 2) / stretch
    offsets = np.arange(math.floor(-reach), math.ceil(reach) + 1)
    near = np.floor(position)[:, None] + offsets[None, :]
    distance = np.abs(near - position[:, None]) * stretch
    weights = np.clip(1 - distance, 0, 1) if method.mode == "linear" else _cubic(distance, method.cubic_coefficient)
    if method.exclude_outside:
        weights = np.where((near < 0) | (near >= axis.old), 0.0, weights)
    if method.antialias or method.exclude_outside:
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((axis.new, axis.old))
    columns = np.clip(near, 0, axis.old - 1).astype(np.int64)
    np.add.at(matrix, (np.arange(axis.new)[:, None], columns), weights)
    return matrix


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Return the weights of Keys (1981) at a distance."""
    inner = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    outer = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
    return np.where(distance <= 1, inner, np.where(distance < 2, outer, 0.0))
