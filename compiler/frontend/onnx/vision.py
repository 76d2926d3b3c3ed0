"""ONNX operators that read images at computed points, and choose among boxes, in torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import Floats, Ints, rule
from thresher.frontend.onnx.values import Unsupported, Value, real_tensors

MAX_BOXES = 1000  # of a class; the choice of each is unrolled


@rule("GridSample")
def grid_sample(x: Tensor, grid: Tensor, *, align_corners: int, mode: str, padding_mode: str) -> Tensor:
    """Return the elements of x [n, c, *sizes] at the points of a grid."""
    kind = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    if kind == "bicubic" and x.dim() != 4:
        raise Unsupported(f"cubic in {x.dim() - 2} dimensions")
    return F.grid_sample(x, grid.to(x.dtype), mode=kind, padding_mode=padding_mode, align_corners=bool(align_corners))


@rule("RoiAlign")
def roi_align(
    x: Tensor,
    rois: Value,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "output_half_pixel",
    mode: str,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    spatial_scale: float,
) -> Tensor:
    """Return regions [count, 4] of images, each in bins of the mean or the largest of sampled points (He et al. 2017)."""
    half_pixel = coordinate_transformation_mode == "half_pixel"
    boxes = rois.tensor() * spatial_scale - (0.5 if half_pixel else 0.0)
    extent = boxes[:, 2:] - boxes[:, :2]
    if not half_pixel:
        extent = extent.clamp(min=1.0)
    if sampling_ratio > 0:
        return _bins(x, boxes, extent, batch_indices, (output_height, output_width), (sampling_ratio,) * 2, mode)
    # as many points as the region is large: that must be a constant
    with real_tensors():
        sizes = (rois.known("rois")[:, 2:] - rois.known("rois")[:, :2]) * spatial_scale
        bins = torch.tensor([output_width, output_height])
        counts = torch.ceil((sizes if half_pixel else sizes.clamp(min=1.0)) / bins).to(torch.int64).tolist()
    results = [
        _bins(x, boxes[i : i + 1], extent[i : i + 1], batch_indices[i : i + 1], (output_height, output_width), (rows, columns), mode)
        for i, (columns, rows) in enumerate(counts)
    ]  # fmt: skip
    return torch.cat(results)


def _bins(
    x: Tensor,
    boxes: Tensor,
    extent: Tensor,
    images: Tensor,
    bins: tuple[int, int],
    samples: tuple[int, int],
    mode: str,
) -> Tensor:
    """Return [boxes, channels, *bins], of ``samples`` points in each bin."""
    count, channels = boxes.shape[0], x.shape[1]
    axes = []
    for d in range(2):  # rows, then columns; boxes have columns first
        position = (torch.arange(bins[d] * samples[d]) + 0.5) / samples[d]
        start, width = boxes[:, 1 - d : 2 - d], extent[:, 1 - d : 2 - d] / bins[d]
        axes.append(_neighbours(start + width * position.to(x.dtype), int(x.shape[2 + d])))
    flat = x.flatten(2)[images.to(torch.int64)]
    corners = []
    for row, row_weight in axes[0]:
        for column, column_weight in axes[1]:
            index = (row[:, :, None] * x.shape[3] + column[:, None, :]).reshape(count, 1, -1)
            weight = (row_weight[:, :, None] * column_weight[:, None, :]).reshape(count, 1, -1)
            corners.append(torch.gather(flat, 2, index.expand(count, channels, -1)) * weight)
    stacked = torch.stack(corners)
    points = stacked.sum(0) if mode == "avg" else stacked.amax(0)
    points = points.reshape(count, channels, bins[0], samples[0], bins[1], samples[1])
    return points.mean((3, 5)) if mode == "avg" else points.amax((3, 5))


def _neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two indices around each position, and their weights: 0 further than one beyond the edge."""
    inside = ((position >= -1.0) & (position <= size)).to(position.dtype)
    clamped = position.clamp(0, size - 1)
    low = clamped.floor().clamp(max=size - 1)
    share = clamped - low
    below = low.to(torch.int64)
    return [(below, (1 - share) * inside), ((below + 1).clamp(max=size - 1), share * inside)]


@rule("NonMaxSuppression")
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    limit: Ints | None = None,
    iou_threshold: Floats | None = None,
    score_threshold: Floats | None = None,
    *,
    center_point_box: int,
) -> Tensor:
    """Return rows (image, class, box) of the best boxes [n, count, 4] of each class, without those that overlap a better one."""
    count = min(limit[0] if limit else 0, int(boxes.shape[1]))
    if count > MAX_BOXES:
        raise Unsupported(f"more than {MAX_BOXES} boxes of a class")
    if count <= 0:
        return torch.zeros(0, 3, dtype=torch.int64)
    corners, area = _corners(boxes, bool(center_point_box))
    threshold = score_threshold[0] if score_threshold else -math.inf
    overlap = iou_threshold[0] if iou_threshold else 0.0
    left = torch.where(scores > threshold, scores, -math.inf)  # [n, classes, count]
    chosen, valid = [], []
    for _ in range(count):
        best, index = left.max(-1, keepdim=True)
        chosen.append(index)
        valid.append(best > -math.inf)
        ratio = _overlap(corners, area, index)
        near = (ratio > overlap) | (torch.arange(left.shape[-1]) == index)
        left = torch.where(near, -math.inf, left)
    index, keep = torch.cat(chosen, -1), torch.cat(valid, -1)  # [n, classes, rounds]
    images, classes, rounds = torch.where(keep)
    return torch.stack([images, classes, index[images, classes, rounds]], 1)


def _corners(boxes: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Return the smaller and the larger corner of boxes [n, count, 4], and their areas [n, count]."""
    if centred:
        low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    else:
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    return torch.cat([low, high], -1), (high - low).prod(-1)


def _overlap(corners: Tensor, area: Tensor, index: Tensor) -> Tensor:
    """Return the intersection over union of the boxes with the one at ``index`` [n, classes, 1]: [n, classes, count]."""
    n, classes, _ = index.shape
    rows = index.reshape(n, classes, 1)
    best = torch.gather(corners, 1, rows.expand(n, classes, 4)).unsqueeze(2)
    best_area = torch.gather(area, 1, rows[..., 0]).unsqueeze(2)
    every = corners.unsqueeze(1)
    low, high = torch.maximum(every[..., :2], best[..., :2]), torch.minimum(every[..., 2:], best[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    union = area.unsqueeze(1) + best_area - shared
    return torch.where(union > 0, shared / union, 0.0)
