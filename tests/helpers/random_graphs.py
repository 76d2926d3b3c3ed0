"""Random programs for the property tests of the fold: image and token values, everything a network is made of, dead and constant channels.

A program is made from a list of steps ``(kind, a, b)`` of small integers, so that hypothesis can shrink it. Each step takes an existing
value (chosen by ``a``) and adds one; ``b`` chooses among the variants of the kind. Built node by node, without torch.export:
milliseconds each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from thresher.ir.nodes import shape_of
from thresher.ir.program import Program

aten = torch.ops.aten


class Builder:
    """A program in the making: image values [1, C, 6, 6] and token values [1, N, C]."""

    def __init__(self, seed: int, amount: float):
        self.generator = torch.Generator().manual_seed(seed)
        self.amount = amount
        graph, x = fx.Graph(), torch.randn(1, 3, 6, 6, generator=self.generator, dtype=torch.float64)
        node = graph.placeholder("x")
        with FakeTensorMode(allow_non_fake_inputs=True):
            node.meta["val"] = torch.empty(x.shape, dtype=torch.float64)
        self.end = graph.output((node,))
        spec = pytree.tree_flatten(((x,), {}))[1]
        self.program = Program(graph, {}, spec, pytree.tree_flatten((x,))[1], (x,), "random")
        self.images, self.tokens = [self.conv(node, 8, 3, 1)], []

    # ------------------------------------------------------------------ pieces

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def dead(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) < self.amount

    def constant(self, value: Tensor) -> fx.Node:
        return self.program.add_constant(value, "c")

    def call(self, target: Callable, *args, **kwargs) -> fx.Node:
        return self.program.insert_call(self.end, target, args, kwargs)

    def weights(self, outputs: int, *rest: int) -> tuple[fx.Node, fx.Node]:
        """Some rows are 0 (half of them with a bias: constants), some columns too (unread)."""
        weight, bias = (
            self.random(outputs, *rest) / max(1, torch.tensor(rest).prod().item()) ** 0.5,
            self.random(outputs),
        )
        dead = self.dead(outputs)
        weight[dead] = 0
        bias[dead & (torch.rand(outputs, generator=self.generator) < 0.5)] = 0
        weight[:, self.dead(rest[0]) & (torch.rand(rest[0], generator=self.generator) < 0.3)] = 0
        return self.constant(weight), self.constant(bias)

    def conv(self, x: fx.Node, outputs: int, kernel: int, groups: int) -> fx.Node:
        weight, bias = self.weights(outputs, shape_of(x)[1] // groups, kernel, kernel)
        return self.call(aten.conv2d.default, x, weight, bias, [1, 1], [kernel // 2] * 2, [1, 1], groups)

    def linear(self, x: fx.Node, outputs: int) -> fx.Node:
        return self.call(aten.linear.default, x, *self.weights(outputs, shape_of(x)[-1]))

    def affine(self, count: int) -> tuple[fx.Node, fx.Node]:
        weight, bias = self.random(count), self.random(count)
        weight[self.dead(count)] = 0
        return self.constant(weight), self.constant(bias)

    # ------------------------------------------------------------------ steps

    def step(self, kind: str, a: int, b: int) -> None:
        if kind in IMAGE:
            x = self.images[a % len(self.images)]
            self.images.append(IMAGE[kind](self, x, b))
        elif kind == "to_tokens":
            x = self.images[a % len(self.images)]
            flat = self.call(aten.reshape.default, x, [1, shape_of(x)[1], 36])
            self.tokens.append(self.call(aten.permute.default, flat, [0, 2, 1]))
        elif self.tokens:
            x = self.tokens[a % len(self.tokens)]
            self.tokens.append(TOKEN[kind](self, x, b))

    def finish(self, b: int) -> Program:
        """Heads that read the last values; some values are outputs as they are."""
        outputs = []
        last = self.images[-1]
        pooled = self.call(aten.mean.dim, last, [2, 3])
        outputs.append(self.linear(pooled, 3))
        if self.tokens:
            outputs.append(self.linear(self.tokens[-1], 2))
        if b % 4 == 0:
            outputs.append(self.images[b // 4 % len(self.images)])
        self.end.args = (tuple(outputs),)
        self.program.out_spec = pytree.tree_flatten(tuple(outputs))[1]
        return self.program.clean().verify()


def same_shape(builder: Builder, values: list[fx.Node], x: fx.Node, b: int) -> fx.Node:
    others = [v for v in values if shape_of(v) == shape_of(x)]
    return others[b % len(others)]


def group_norm(s: Builder, x: fx.Node, b: int) -> fx.Node:
    channels = shape_of(x)[1]
    groups = next(g for g in ((1, 2, 4, channels)[b % 4], 1) if channels % g == 0)
    return s.call(aten.group_norm.default, x, groups, *s.affine(channels), 1e-5)


def shuffle(s: Builder, x: fx.Node, b: int) -> fx.Node:
    channels = shape_of(x)[1]
    y = s.call(aten.reshape.default, x, [1, 2, channels // 2, 6, 6])
    y = s.call(aten.permute.default, y, [0, 2, 1, 3, 4])
    return s.call(aten.reshape.default, y, [1, channels, 6, 6])


def gate(s: Builder, x: fx.Node, b: int) -> fx.Node:
    pooled = s.call(aten.mean.dim, x, [2, 3], True)
    hidden = s.call(aten.relu.default, s.conv(pooled, 4, 1, 1))
    return s.call(aten.mul.Tensor, x, s.call(aten.sigmoid.default, s.conv(hidden, shape_of(x)[1], 1, 1)))


def halves(s: Builder, x: fx.Node, b: int) -> fx.Node:
    """Split, one half through an operator, concatenated again."""
    channels = shape_of(x)[1]
    first = s.call(aten.slice.Tensor, x, 1, 0, channels // 2)
    second = s.call(aten.slice.Tensor, x, 1, channels // 2, channels)
    second = s.conv(second, channels // 2, 3, 1) if b % 2 else s.call(aten.relu.default, second)
    return s.call(aten.cat.default, [first, second] if b % 3 else [second, first], 1)


def transposed(s: Builder, x: fx.Node, b: int) -> fx.Node:
    groups = 2 if b % 2 else 1
    weight = s.random(shape_of(x)[1], 8 // groups, 3, 3) / 6
    weight[:, s.dead(8 // groups)] = 0
    weight[s.dead(shape_of(x)[1])] = 0
    return s.call(
        aten.conv_transpose2d.input, x, s.constant(weight), s.constant(s.random(8)), [1, 1], [1, 1], [0, 0], groups
    )


def pixels(s: Builder, x: fx.Node, b: int) -> fx.Node:
    up = s.call(aten.pixel_shuffle.default, s.conv(x, 16, 1, 1), 2)
    down = s.call(aten.max_pool2d.default, up, [2, 2]) if b % 2 else s.call(aten.pixel_unshuffle.default, up, 2)
    return s.conv(down, 8, 1, 1)


def attention(s: Builder, x: fx.Node, b: int) -> fx.Node:
    """Two heads of width 4, fused or separate projections, with and without causality and shared keys."""
    n = shape_of(x)[1]

    def heads(v: fx.Node, count: int) -> fx.Node:
        return s.call(aten.permute.default, s.call(aten.reshape.default, v, [1, n, count, 4]), [0, 2, 1, 3])

    shared = b % 3 == 0
    if b % 2 and not shared:
        qkv = s.call(aten.reshape.default, s.linear(x, 24), [1, n, 3, 2, 4])
        qkv = s.call(aten.permute.default, qkv, [2, 0, 3, 1, 4])
        q, k, v = (s.call(aten.select.int, qkv, 0, i) for i in range(3))
    else:
        q, k, v = (heads(s.linear(x, 4 * count), count) for count in (2, 1 if shared else 2, 1 if shared else 2))
    extra = {"enable_gqa": True} if shared else {}
    y = s.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, b % 5 == 0, **extra)
    y = s.call(aten.reshape.default, s.call(aten.permute.default, y, [0, 2, 1, 3]), [1, n, 8])
    return s.linear(y, shape_of(x)[-1])


def gated_unit(s: Builder, x: fx.Node, b: int) -> fx.Node:
    gate = s.call((aten.silu.default, aten.gelu.default, aten.relu.default)[b % 3], s.linear(x, 10))
    return s.linear(s.call(aten.mul.Tensor, gate, s.linear(x, 10)), shape_of(x)[-1])


def layer_norm(s: Builder, x: fx.Node, b: int) -> fx.Node:
    width = shape_of(x)[-1]
    weight, bias = s.affine(width)
    if b % 3 == 0:
        return s.call(aten.rms_norm.default, x, [width], weight, 1e-6)
    return s.call(aten.layer_norm.default, x, [width], weight, bias, 1e-5)


IMAGE: dict[str, Callable[[Builder, fx.Node, int], fx.Node]] = {
    "conv": lambda s, x, b: s.conv(x, (8, 12)[b % 2], (1, 3)[b // 2 % 2], 1),
    "grouped": lambda s, x, b: s.conv(x, 8, 3, 4 if b % 2 else 2),
    "depthwise": lambda s, x, b: s.conv(x, shape_of(x)[1] * (1 + b % 2), 3, shape_of(x)[1]),
    "transposed": transposed,
    "act": lambda s, x, b: s.call(
        (aten.relu.default, aten.sigmoid.default, aten.hardswish.default, aten.gelu.default)[b % 4], x
    ),
    "affine": lambda s, x, b: s.call(aten.mul.Tensor, x, s.constant(s.random(shape_of(x)[1], 1, 1).relu())),
    "residual": lambda s, x, b: s.call(aten.add.Tensor, x, same_shape(s, s.images, x, b)),
    "block": lambda s, x, b: s.call(
        aten.add.Tensor, x, s.conv(s.call(aten.relu.default, s.conv(x, 6, 3, 1)), shape_of(x)[1], 1, 1)
    ),
    "concat": lambda s, x, b: s.call(aten.cat.default, [x, same_shape(s, s.images, x, b), s.conv(x, 4, 1, 1)], 1),
    "halves": halves,
    "gate": gate,
    "pool": lambda s, x, b: s.call(aten.avg_pool2d.default, x, [3, 3], [1, 1], [1, 1]),
    "shuffle": shuffle,
    "pixels": pixels,
    "group_norm": group_norm,
    "flip": lambda s, x, b: s.call(aten.flip.default, x, [1 + b % 2]),
}
TOKEN: dict[str, Callable[[Builder, fx.Node, int], fx.Node]] = {
    "linear": lambda s, x, b: s.linear(x, (8, 12)[b % 2]),
    "token_act": lambda s, x, b: s.call((aten.gelu.default, aten.tanh.default)[b % 2], x),
    "token_residual": lambda s, x, b: s.call(aten.add.Tensor, x, same_shape(s, s.tokens, x, b)),
    "attention": attention,
    "attention_block": lambda s, x, b: s.call(aten.add.Tensor, x, attention(s, layer_norm(s, x, b), b)),
    "layer_norm": layer_norm,
    "gated_unit": gated_unit,
    "roll": lambda s, x, b: s.call(aten.roll.default, x, [1 + b % 3], [1 + b % 2]),
}
KINDS = [*IMAGE, "to_tokens", *TOKEN]


def build(seed: int, amount: float, steps: list[tuple[str, int, int]]) -> Program:
    builder = Builder(seed, amount)
    for kind, a, b in steps:
        if sum(shape_of(v)[1] for v in builder.images) > 200:
            break
        builder.step(kind, -1 - a, b)  # mostly the latest value
    return builder.finish(seed)
