"""ONNX's Resize in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Node, Unsupported, rule


@rule("Resize")
def resize(node: Node, x: Tensor, region: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
    """Return x in other spatial sizes: nearest by any rule of coordinates, linear by those that torch has."""
    mode, where = node.get("mode", "nearest"), node.get("coordinate_transformation_mode", "half_pixel")
    if node.opset < 11:
        region, scales, where = None, region, "asymmetric"
    if sizes is not None and node.static(sizes, "sizes").size:
        size = [int(s) for s in node.static(sizes, "sizes")][2:]
    else:
        factors = [float(f) for f in node.static(scales, "scales")]
        size = [math.floor(int(s) * f) for s, f in zip(x.shape[2:], factors[2:])]
    if mode == "nearest":
        return _nearest(node, x, size, where)
    if mode == "linear" and where in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        kind = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.dim() - 2]
        return F.interpolate(x, size, mode=kind, align_corners=where == "align_corners")
    raise Unsupported(f"{mode} with {where}")


ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda v: np.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: np.floor(v + 0.5),
}


def _nearest(node: Node, x: Tensor, size: Sequence[int], where: str) -> Tensor:
    """Return each element from the nearest one of x: by torch where that picks the same ones, else by index."""
    rounding = node.get("nearest_mode", "round_prefer_floor") if node.opset >= 11 else "floor"
    indices = []
    for new, old in zip(size, x.shape[2:]):
        position, scale = np.arange(new), int(old) / new
        if where == "asymmetric":
            source = position * scale
        elif where in ("half_pixel", "pytorch_half_pixel"):
            source = (position + 0.5) * scale - 0.5
        elif where == "align_corners":
            source = position * ((int(old) - 1) / max(new - 1, 1))
        else:
            raise Unsupported(f"nearest with {where}")
        rounded = ROUNDINGS[rounding](source)
        indices.append(np.clip(rounded, 0, int(old) - 1).astype(np.int64))
    if all((p == np.arange(len(p)) * int(old) // len(p)).all() for p, old in zip(indices, x.shape[2:])):
        return F.interpolate(x, list(size), mode="nearest")
    for d, index in enumerate(indices, 2):
        x = x.index_select(d, torch.from_numpy(index))
    return x
