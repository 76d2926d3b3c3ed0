"""Windows that slide over images: the padding that the attributes of convolutions and pools describe.

size of the result = floor((size + padding - dilation (window - 1) - 1) / stride) + 1;  ceil where ``ceil_mode`` is set, without
windows that would begin behind the input and the padding before it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.values import Unsupported


@dataclass(frozen=True)
class Window:
    """Sizes, strides, dilations, and padding on both sides of each spatial dimension."""

    size: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]
    ceil: bool = False

    @property
    def symmetric(self) -> bool:
        """The padding is the same on both sides, as torch has it."""
        return list(self.before) == list(self.after) and min(self.before, default=0) >= 0

    def span(self, d: int) -> int:
        """Return how many elements the window covers along a dimension."""
        return self.dilation[d] * (self.size[d] - 1) + 1

    def count(self, d: int, size: int) -> int:
        """Return how many windows there are along a dimension of this size."""
        free = size + self.before[d] + self.after[d] - self.span(d)
        if not self.ceil:
            return free // self.stride[d] + 1
        count = -(-free // self.stride[d]) + 1
        return count - 1 if (count - 1) * self.stride[d] >= size + self.before[d] else count

    def outside(self, sizes: Sequence[int]) -> list[int]:
        """Return how far the last window reaches over the input and its padding, for each dimension."""
        last = [(self.count(d, s) - 1) * self.stride[d] + self.span(d) for d, s in enumerate(sizes)]
        return [max(0, e - s - b - a) for e, s, b, a in zip(last, sizes, self.before, self.after)]

    def padded(self, x: Tensor, fill: float) -> tuple[Tensor, Window]:
        """Return x with all padding in it, that for windows that reach over it too, and the window without padding."""
        outside = self.outside([int(s) for s in x.shape[2:]])
        around = [n for b, a, o in zip(self.before[::-1], self.after[::-1], outside[::-1]) for n in (b, a + o)]
        none = [0] * len(self.size)
        return F.pad(x, around, value=fill), replace(self, before=none, after=none, ceil=False)


def window_of(
    x: Tensor,
    size: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
    ceil_mode: int = 0,
) -> Window:
    """Return the window that attributes describe, over x [n, c, *sizes]."""
    rank = len(size)
    if x.dim() != rank + 2:
        raise Unsupported(f"a window of {rank} dimensions over an input of {x.dim() - 2}")
    pads = list(pads or [0] * 2 * rank)
    window = Window(size, strides or [1] * rank, dilations or [1] * rank, pads[:rank], pads[rank:], bool(ceil_mode))
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for d, length in enumerate(int(s) for s in x.shape[2:]):
            stride = window.stride[d]
            totals.append(max(0, (-(-length // stride) - 1) * stride + window.span(d) - length))
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (less, more) if auto_pad == "SAME_UPPER" else (more, less)
        return replace(window, before=before, after=after, ceil=False)
    if auto_pad == "VALID":
        return replace(window, before=[0] * rank, after=[0] * rank)
    return window
