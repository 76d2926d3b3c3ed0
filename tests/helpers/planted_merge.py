"""A pass that merges parallel convolutions, and seven faults that it may have; the case is as a beginner writes it.

``conv(x, w3) + conv(x, w1) (+ x)`` is one convolution with the 1x1 kernel inside the 3x3 one, and 1 in its middle for ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from thresher.authoring import argument, dtype_of, is_tensor, shape_of
from thresher.ir.lineage import Restore
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.testing import Case

aten = torch.ops.aten
FAULTS = (
    "padding always centred", "dilation ignored", "a shared weight allowed", "identity wrong for groups", "alpha of add ignored",
    "stride ignored", "way back of the weight wrong, of the bias none",
)  # fmt: skip


class Parallel(nn.Module):
    """conv3(x) + conv1(x) + x."""

    def __init__(self, channels: int):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.narrow(x) + x


def build(batch: int, channels: int) -> tuple[nn.Module, tuple]:
    return Parallel(channels), (torch.randn(batch, channels, 5, 5),)


BEGINNERS = Case("parallel convolutions", build, batch=(1, 2), channels=(4, 6))


@dataclass(frozen=True)
class Conv:
    """A convolution whose parameters are constants."""

    call: fx.Node
    weight: fx.Node
    bias: fx.Node
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @staticmethod
    def of(program: Program, node: Any) -> Conv | None:
        if not is_tensor(node) or node.target is not aten.conv2d.default or len(node.users) != 1:
            return None
        bias = argument(node, 2, "bias")
        if program.constant(node.args[1]) is None or bias is None or program.constant(bias) is None:
            return None
        lists = (
            list(argument(node, i, n, [d, d])) for i, n, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
        )
        return Conv(node, node.args[1], bias, *lists, argument(node, 6, "groups", 1))


@dataclass(frozen=True)
class MergeParallel(Pass):
    """Merge a convolution with 1x1 kernels, or its input itself, into the convolution beside it."""

    name: ClassVar[str] = "merge-parallel"
    target_ops: ClassVar[tuple] = (aten.add.Tensor,)
    fault: str = ""

    def apply(self, program: Program, context: Context) -> PassResult:
        work, rewrites, refusals = program.clone(), [], []
        for add in list(work.calls(aten.add.Tensor)):
            sides = add.args[:2]
            for first, second in (sides, sides[::-1]):
                wide = Conv.of(work, first)
                if wide is None or not is_tensor(second):
                    continue
                if argument(add, 2, "alpha", 1) != 1 and self.fault != "alpha of add ignored":
                    refusals.append(Note.at(add, "it is a scaled sum"))
                    continue
                merge = self._identity if second is wide.call.args[0] else self._narrow
                if why := merge(work, add, wide, second):
                    refusals.append(Note.at(add, why))
                    continue
                rewrites.append(Note.at(add, "two parallel branches"))
                break
        return PassResult(work.clean(), rewrites, refusals) if rewrites else PassResult(program, [], refusals)

    def _shared(self, *constants: fx.Node) -> bool:
        return self.fault != "a shared weight allowed" and any(len(c.users) != 1 for c in constants)

    def _offset(self, wide: Conv, padding: list[int]) -> list[int]:
        return [a - b for a, b in zip(wide.padding, padding)]

    def _place(self, wide: Conv, padding: list[int]) -> tuple[list[int] | None, str]:
        """Return where in the wide kernel one element stands that reads what a 1x1 kernel with this padding does."""
        offset = self._offset(wide, padding)
        if wide.dilation != [1, 1] and self.fault != "dilation ignored":
            return None, "it is dilated"
        if not all(0 <= o < s for o, s in zip(offset, shape_of(wide.weight)[2:])):
            return None, "the kernels do not overlap"
        return offset, ""

    def _narrow(self, work: Program, add: fx.Node, wide: Conv, second: fx.Node) -> str:
        narrow = Conv.of(work, second)
        if narrow is None or narrow.call.args[0] is not wide.call.args[0] or shape_of(narrow.weight)[2:] != (1, 1):
            return "the other branch is no convolution with 1x1 kernels of the same input"
        if shape_of(narrow.call) != shape_of(wide.call) or narrow.groups != wide.groups:
            return "shapes or groups differ"
        if narrow.stride != wide.stride and self.fault != "stride ignored":
            return "strides differ"
        if wide.weight is narrow.weight or wide.bias is narrow.bias:
            return "one constant for both"
        if self._shared(wide.weight, wide.bias, narrow.weight, narrow.bias):
            return "a constant is read elsewhere, too"
        place, why = self._place(wide, narrow.padding)
        if place is None:
            return why
        weight, bias = work.constant(wide.weight).double().clone(), work.constant(wide.bias).double()
        extra = work.constant(narrow.weight).double()[:, :, 0, 0]
        weight[:, :, place[0], place[1]] += extra
        self._replace(
            work,
            add,
            wide,
            weight,
            bias + work.constant(narrow.bias).double(),
            (narrow.weight.target, narrow.bias.target),
        )
        return ""

    def _identity(self, work: Program, add: fx.Node, wide: Conv, second: fx.Node) -> str:
        if wide.stride != [1, 1] or shape_of(second) != shape_of(wide.call):
            return "the result has another shape"
        if self._shared(wide.weight, wide.bias):
            return "a constant is read elsewhere, too"
        place, why = self._place(wide, [0, 0])
        if place is None:
            return why
        weight = work.constant(wide.weight).double().clone()
        out, inner = weight.shape[:2]
        for channel in range(out):
            column = channel // wide.groups if self.fault == "identity wrong for groups" else channel % inner
            weight[channel, column % inner, place[0], place[1]] += 1
        self._replace(work, add, wide, weight, work.constant(wide.bias).double(), ())
        return ""

    def _replace(
        self, work: Program, add: fx.Node, wide: Conv, weight: Tensor, bias: Tensor, consumed: tuple[str, ...]
    ) -> None:
        made = [
            work.add_constant(value, f"{old.target}_merged", dtype_of(old), like=wide.call)
            for value, old in ((weight, wide.weight), (bias, wide.bias))
        ]
        sources = [wide.weight.target, wide.bias.target, *consumed]
        originals = {name: work.constants[name].double() for name in sources}
        faulty = self.fault == "way back of the weight wrong, of the bias none"
        for new, old, value in zip(made, (wide.weight, wide.bias), (weight, bias)):
            added = 0.0 if faulty else value - originals[old.target]
            keep = {name: originals[name] for name in consumed}
            if faulty and old is wide.bias:
                continue
            work.lineage.append(Restore((new.target,), _back(new.target, old.target, added, keep)))
        centred = [s // 2 for s in shape_of(wide.weight)[2:]]
        padding = centred if self.fault == "padding always centred" else wide.padding
        args = (wide.call.args[0], *made, wide.stride, padding, wide.dilation, wide.groups)
        add.replace_all_uses_with(work.insert_call(add, aten.conv2d.default, args, like=add))


def _back(new: str, old: str, added: Any, keep: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda values: {old: values[new].double() - added, **{n: values.get(n, v) for n, v in keep.items()}}
