"""Functions that write into their inputs, in every way that torch's own tests of functionalisation have: views, aliases, shapes in place.

The patterns follow test/test_functionalization.py and test/functorch/test_aotdispatch.py of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pattern = tuple[Callable[..., Any], Callable[[], tuple]]


def grid() -> Tensor:
    return torch.arange(8.0).reshape(4, 2) - 3


def simple(x: Tensor) -> Tensor:
    x.mul_(2)
    return x * 3


def through_a_view(x: Tensor) -> Tensor:
    x.view(8).add_(1)
    return x * x


def multiple_views_of_same_base(x: Tensor) -> Tensor:
    y, z = x.view(-1), x.view(-1)
    x.add_(1)
    return z + y


def inplace_on_non_view(x: Tensor) -> Tensor:
    y = x.view(8)
    x.add_(torch.ones(4, 2))
    return y


def as_strided(x: Tensor) -> Tensor:
    x.as_strided((2,), (2,), 1).add_(1)
    return x


def diagonal(x: Tensor) -> Tensor:
    x.diagonal().add_(torch.ones(2))
    return x * x


def split(x: Tensor) -> Tensor:
    _, y = x.split(2)
    z = y.diagonal()
    z.add_(torch.ones(2))
    return z


def select_and_transpose(x: Tensor) -> Tensor:
    x.transpose(1, 0)[0].add_(torch.ones(4))
    return x


def index_put(x: Tensor) -> Tensor:
    y = x.view(8)
    y.index_put_((torch.arange(4),), torch.arange(4.0))
    return y


def masked_fill(x: Tensor) -> Tensor:
    x[x > 0] = 7.0
    return x + 1


def comparison_in_place(x: Tensor) -> Tensor:
    return x.ge_(0)


def copy_of_another_shape_and_dtype(x: Tensor, y: Tensor) -> Tensor:
    x.diagonal().copy_(y)
    return x.sum()


def fill(x: Tensor) -> Tensor:
    x.diagonal().fill_(5)
    return x - 1


def scatter(x: Tensor, index: Tensor) -> Tensor:
    x.scatter_(0, index, 9.0)
    return x.sum(0)


def index_copy(x: Tensor, row: Tensor, y: Tensor) -> Tensor:
    """The cache of a language model: one row at a time."""
    x.index_copy_(0, row, y)
    return x * 2


def out_argument(x: Tensor, y: Tensor) -> Tensor:
    torch.add(x, 1, out=y)
    return y * 2


def several(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    x.add_(1)
    z.mul_(y)
    return x + y, z


def swapped(x: Tensor, y: Tensor) -> Tensor:
    t = x.clone()
    x.copy_(y)
    y.copy_(t)
    return x - y


def old_value_returned(x: Tensor) -> Tensor:
    y = x.clone()
    x.add_(1)
    return y


def another_input_written(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y)
    return y + 0


def is_the_output(x: Tensor) -> Tensor:
    x.add_(1)
    return x


def view_is_an_output(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x.add_(1)
    return x, x.view(-1), x[1]


def output_is_an_input(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, y + 1


def output_is_a_view(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.view(-1), x.T


def outputs_share_memory(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    return y, y.view(-1)[2:]


def siblings(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1
    first, second = y.split(2)
    return first, second.t()[1:], y[::2, 0], y.sum(), x * 2


def detached(x: Tensor) -> Tensor:
    x.detach().add_(1)
    return x * 1


def written_and_left(x: Tensor) -> Tensor:
    """The new value is the old one."""
    x.add_(1)
    x.sub_(1)
    return x + 2


def zeroed_many_times(x: Tensor) -> Tensor:
    for _ in range(3):
        x.add_(x)
    x.relu_()
    return x.mean()


def nothing_else(x: Tensor) -> None:
    x.mul_(-1)


def integers(x: Tensor, step: Tensor) -> Tensor:
    step.add_(1)
    return x * step


def booleans(x: Tensor, seen: Tensor) -> Tensor:
    seen.logical_or_(x > 0)
    return torch.where(seen, x, 0.0)


def nested(state: dict[str, Any], x: Tensor) -> Tensor:
    state["h"].copy_(torch.tanh(state["h"] + x))
    state["layers"][1].add_(x)
    return state["h"] * state["layers"][0]


def column_by_column(x: Tensor) -> Tensor:
    for i in range(2):
        x[:, i] += i
    return x


def transposed(x: Tensor) -> Tensor:
    x.transpose_(0, 1)
    return x[0] + 1


def transposed_and_written(x: Tensor) -> Tensor:
    x.t_()
    x[0].add_(1)
    return x * 2


def squeezed(x: Tensor) -> Tensor:
    x.unsqueeze_(0)
    return x + 1


def set_to_another(x: Tensor, y: Tensor) -> Tensor:
    x.set_(y)
    return x * 2


def data_replaced(x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x + 1


def resized(x: Tensor) -> Tensor:
    x.resize_(6)
    x.fill_(1)
    return x * 1


def g(*shape: int) -> Callable[[], tuple]:
    return lambda: (torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape),)


#: What is written, and arguments for a call.
PATTERNS: dict[str, Pattern] = {
    f.__name__: (f, args)
    for f, args in (
        (simple, lambda: (grid(),)),
        (through_a_view, lambda: (grid(),)),
        (multiple_views_of_same_base, g(4)),
        (inplace_on_non_view, lambda: (grid(),)),
        (as_strided, g(9)),
        (diagonal, g(2, 2)),
        (split, lambda: (grid(),)),
        (select_and_transpose, lambda: (grid(),)),
        (index_put, lambda: (grid(),)),
        (masked_fill, lambda: (grid(),)),
        (comparison_in_place, lambda: (grid(),)),
        (copy_of_another_shape_and_dtype, lambda: (torch.ones(2, 2), torch.tensor([3]))),
        (fill, g(3, 3)),
        (scatter, lambda: (grid(), torch.tensor([[1, 3], [0, 0]]))),
        (index_copy, lambda: (grid(), torch.tensor([2]), torch.full((1, 2), 9.0))),
        (out_argument, lambda: (grid(), torch.zeros(4, 2))),
        (several, lambda: (grid(), grid() + 1, grid() * 2)),
        (swapped, lambda: (grid(), grid() + 5)),
        (old_value_returned, lambda: (grid(),)),
        (another_input_written, lambda: (grid(), grid() + 5)),
        (is_the_output, lambda: (grid(),)),
        (view_is_an_output, lambda: (grid(),)),
        (output_is_an_input, lambda: (grid(), grid())),
        (output_is_a_view, lambda: (grid(),)),
        (outputs_share_memory, lambda: (grid(),)),
        (siblings, lambda: (grid(),)),
        (detached, lambda: (grid(),)),
        (written_and_left, lambda: (grid(),)),
        (zeroed_many_times, lambda: (grid(),)),
        (nothing_else, lambda: (grid(),)),
        (integers, lambda: (grid(), torch.tensor(3))),
        (booleans, lambda: (grid(), torch.zeros(4, 2, dtype=torch.bool))),
        (nested, lambda: ({"h": torch.ones(3), "layers": [torch.ones(3) * 2, torch.ones(3)]}, torch.ones(3))),
        (column_by_column, lambda: (grid(),)),
    )
}
#: Those that change the shape, the strides or the memory of a tensor of the caller.
METADATA: dict[str, Pattern] = {
    f.__name__: (f, args)
    for f, args in (
        (transposed, lambda: (grid(),)),
        (transposed_and_written, lambda: (grid(),)),
        (squeezed, lambda: (grid(),)),
        (set_to_another, lambda: (grid(), grid() + 1)),
        (data_replaced, lambda: (grid(),)),
        (resized, g(3)),
    )
}
