"""Parts of large tensors, copied once."""

from __future__ import annotations

from torch import Tensor

BLOCK = 1 << 20  # bytes that stay in the cache between two selections


def take(tensor: Tensor, indices: dict[int, Tensor]) -> Tensor:
    """``tensor`` with only the given indices of the given dimensions, in their order.

    Selecting from one dimension after the other would write, and let the system provide, the memory of each step: block by block only the
    result is.
    """
    if len(indices) < 2:
        for dim, index in indices.items():
            tensor = tensor.index_select(dim, index)
        return tensor
    first, *rest = sorted(indices)
    result = tensor.new_empty([indices[d].numel() if d in indices else size for d, size in enumerate(tensor.shape)])
    row = tensor.numel() // max(tensor.shape[first], 1) * tensor.element_size()
    start = 0
    for block in indices[first].split(max(1, BLOCK // max(row, 1))):
        part = tensor.index_select(first, block)
        for dim in rest:
            part = part.index_select(dim, indices[dim])
        result.narrow(first, start, block.numel()).copy_(part)
        start += block.numel()
    return result
