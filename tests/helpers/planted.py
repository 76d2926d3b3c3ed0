"""Wrong passes. Each has one defect that was once somebody's; the proof kit must see it, by the check and in the words that are named.

``PLANTED`` maps a name to (pass, case, check, part of the message).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.modules import Function
from thresher.ir.lineage import Restore
from thresher.ir.nodes import dtype_of, is_tensor, shape_of
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.testing import Case, settle

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default
Rewrite = Callable[[Program, fx.Node], bool]


@dataclass(frozen=True)
class Planted(Pass):
    """Goes through the calls of ``target``; ``rewrite(work, node)`` edits the copy and says whether it did."""

    name: ClassVar[str] = "planted"
    target: Any = None
    rewrite: Rewrite = lambda work, node: False
    clean: bool = True
    copies: bool = True
    returns_copies: bool = False
    says: Callable[[fx.Node], list[Note]] = lambda node: [Note.at(node, "rewritten")]

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone() if self.copies else program
        notes, changed = [], self.returns_copies
        for node in list(work.calls(self.target)):
            if self.rewrite(work, node):
                notes += self.says(node)
                changed = True
        work = work.clean() if self.clean else work
        return PassResult(work if changed else program, notes)


PLANTED: dict[str, tuple[Pass, Case, str, str]] = {}


def plant(name: str, target: Any, case: Case, check: str, words: str, **options: Any) -> Callable[[Rewrite], Rewrite]:
    def register(rewrite: Rewrite) -> Rewrite:
        PLANTED[name] = (Planted(target, rewrite, **options), case, check, words)
        return rewrite

    return register


def function(name: str, call: Callable, *shapes: tuple, **sizes: Any) -> Case:
    """A case of one function; a shape may name sizes."""

    def build(**given: Any) -> tuple[nn.Module, tuple]:
        return Function(call), tuple(torch.randn([given.get(d, d) for d in shape]) for shape in shapes)

    return Case(name, build, **(sizes or {"n": (2, 3), "c": (4, 6)}))


def replaced(node: fx.Node, by: fx.Node) -> bool:
    (result(node) if node.target is NORM else node).replace_all_uses_with(by)
    return True


def result(bn: fx.Node) -> fx.Node:
    """The normalised values: the first of the three results."""
    return next((u for u in bn.users if u.args[1] == 0), bn)


# ---------------------------------------------------------------------- batch norm into convolutions


def conv_bn(n: int, c: int, **options: Any) -> tuple[nn.Module, tuple]:
    return settle(nn.Sequential(nn.Conv2d(4, c, 3, **options), nn.BatchNorm2d(c))), (torch.randn(n, 4, 6, 7),)


def bn_conv(n: int, c: int, groups: int = 1, padding: int = 0) -> tuple[nn.Module, tuple]:
    layers = nn.BatchNorm2d(c), nn.Conv2d(c, 8, 3, groups=groups, padding=padding)
    return settle(nn.Sequential(*layers)), (torch.randn(n, c, 6, 7),)


CONV_BN = Case("conv, batch norm", conv_bn, n=(1, 3), c=(4, 6))


def statistics(work: Program, bn: fx.Node, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """The scale and the shift of a batch norm, float64."""
    gamma, beta, mean, variance = (work.constants[a.target].double() for a in bn.args[1:5])
    scale = gamma / (variance + (bn.args[6] if eps is None else eps)).sqrt()
    return scale, beta - mean * scale


def into_conv(work: Program, bn: fx.Node, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float64) -> bool:
    conv = bn.args[0]
    if conv.target is not aten.conv2d.default:
        return False
    weight, bias = (work.constants[a.target].to(dtype) for a in conv.args[1:3])
    new = [
        work.add_constant(value, "folded", dtype_of(old), like=conv)
        for value, old in (
            (weight * scale.to(dtype)[:, None, None, None], conv.args[1]),
            (bias * scale.to(dtype) + shift.to(dtype), conv.args[2]),
        )
    ]
    return replaced(bn, work.insert_call(bn, conv.target, (conv.args[0], *new, *conv.args[3:]), like=conv))


@plant("no eps", NORM, CONV_BN, "exact", "relative error")
def no_eps(work: Program, bn: fx.Node) -> bool:
    return into_conv(work, bn, *statistics(work, bn, eps=0.0))


@plant("single precision", NORM, CONV_BN, "exact", "relative error")
def single_precision(work: Program, bn: fx.Node) -> bool:
    return into_conv(work, bn, *statistics(work, bn), dtype=torch.float32)


@plant("weight overwritten for one of its uses", NORM, CONV_BN, "near miss", "is used in the place of")
def overwritten(work: Program, bn: fx.Node) -> bool:
    conv = bn.args[0]
    if conv.target is not aten.conv2d.default:
        return False
    scale, shift = statistics(work, bn)
    for argument, change in ((1, lambda w: w * scale[:, None, None, None]), (2, lambda b: b * scale + shift)):
        name = conv.args[argument].target
        work.constants[name] = change(work.constants[name].double())
    return replaced(bn, conv) if len(conv.users) == 1 else False


def siamese(n: int, c: int) -> tuple[nn.Module, tuple]:
    """Two branches of layers that are alike, but not the same."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(4, c, 3), nn.Conv2d(4, c, 3), nn.BatchNorm2d(c)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.a(x)) + self.b(x)

    return settle(Model()), (torch.randn(n, 4, 6, 7),)


PLANTED["weight overwritten for one of its uses"] = (
    PLANTED["weight overwritten for one of its uses"][0],
    Case("siamese", siamese, n=(1, 3), c=(4, 6)),
    "near miss",
    "is used in the place of",
)


@plant("somebody else reads it", NORM, CONV_BN, "near miss", "is an output, too")
def read_elsewhere(work: Program, bn: fx.Node) -> bool:
    conv = bn.args[0]
    if conv.target is not aten.conv2d.default:
        return False
    folded = into_conv(work, bn, *statistics(work, bn))
    new = next(n for n in reversed(list(work.calls(aten.conv2d.default))))
    conv.replace_all_uses_with(new)
    return folded


@plant(
    "padding has a shift, too",
    NORM,
    Case("bn, conv", bn_conv, n=(1, 2), c=(4, 8), padding=(0, 1)),
    "exact",
    "example",
)
def through_padding(work: Program, bn: fx.Node) -> bool:
    conv = next(iter(result(bn).users))
    if conv.target is not aten.conv2d.default or len(result(bn).users) > 1 or conv.args[6:7] not in ((), (1,)):
        return False
    scale, shift = statistics(work, bn)
    weight, bias = (work.constants[a.target].double() for a in conv.args[1:3])
    w = work.add_constant(weight * scale[:, None, None], "w", dtype_of(conv.args[1]))
    b = work.add_constant(bias + (weight * shift[:, None, None]).sum((1, 2, 3)), "b", dtype_of(conv.args[2]))
    return replaced(conv, work.insert_call(conv, conv.target, (bn.args[0], w, b, *conv.args[3:]), like=conv))


@plant(
    "group off by one",
    NORM,
    Case("bn, grouped conv", bn_conv, n=(1,), c=(8,), groups=(1, 2)),
    "exact",
    "relative",
)
def wrong_group(work: Program, bn: fx.Node) -> bool:
    conv = next(iter(result(bn).users))
    if conv.target is not aten.conv2d.default or len(result(bn).users) > 1 or conv.args[4:5] not in ((), ([0, 0],)):
        return False
    scale, shift = statistics(work, bn)
    weight, bias = (work.constants[a.target].double() for a in conv.args[1:3])
    groups = conv.args[6] if len(conv.args) > 6 else 1
    by_group = torch.stack([scale.chunk(groups)[(g + 1) % groups] for g in range(groups)])  # the next group's
    shifts = torch.stack([shift.chunk(groups)[(g + 1) % groups] for g in range(groups)])
    of = torch.arange(len(weight)) // (len(weight) // groups)
    w = work.add_constant(weight * by_group[of][:, :, None, None], "w", dtype_of(conv.args[1]))
    b = work.add_constant(bias + (weight * shifts[of][:, :, None, None]).sum((1, 2, 3)), "b", dtype_of(conv.args[2]))
    return replaced(conv, work.insert_call(conv, conv.target, (bn.args[0], w, b, *conv.args[3:]), like=conv))


# ---------------------------------------------------------------------- dead channels


def mlp(
    n: int, c: int, bias: float = 0.0, act: nn.Module | None = None, small: bool = False
) -> tuple[nn.Module, tuple]:
    """Channel 1 of the hidden ones is dead: its weights are 0, its bias is ``bias``."""
    model = nn.Sequential(nn.Linear(6, c), act or nn.ReLU(), nn.Linear(c, 3))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0.0, bias
        if small:
            model[0].weight[2], model[0].bias[2] = 1e-5, 0.0
    return model, (torch.randn(n, 6),)


def normed(n: int, c: int) -> tuple[nn.Module, tuple]:
    return mlp(n, c, act=nn.LayerNorm(c, elementwise_affine=False))


MLP = Case("mlp", mlp, n=(5, 6), c=(4, 7))


def cut(work: Program, first: fx.Node, keep: Tensor, metadata: bool = True) -> bool:
    """Remove hidden channels between two linear layers."""
    middle = next(iter(first.users))
    second = next(iter(middle.users), None)
    if second is None or second.target is not aten.linear.default or len(middle.users) + len(first.users) > 2:
        return False
    if bool(keep.all()) or middle.target not in (aten.relu.default, aten.layer_norm.default):
        return False
    for layer, argument, dim in ((first, 1, 0), (first, 2, 0), (second, 1, 1)):
        node = layer.args[argument]
        work.constants[node.target] = work.constants[node.target].index_select(dim, keep.nonzero().flatten())
        if metadata:
            work.set_fake(node, dtype_of(node))
    if middle.target is aten.layer_norm.default:
        middle.args = (middle.args[0], [int(keep.sum())], *middle.args[2:])
    if metadata:
        work.propagate()
    return True


def alive(work: Program, linear: fx.Node) -> Tensor:
    weight, bias = (work.constants[a.target] for a in linear.args[1:3])
    return (weight != 0).any(1) | (bias != 0)


@plant("metadata left as it was", aten.linear.default, MLP, "well-formed", "but its node says")
def stale(work: Program, linear: fx.Node) -> bool:
    return cut(work, linear, alive(work, linear), metadata=False)


@plant(
    "constant of a dead channel dropped",
    aten.linear.default,
    Case("bias", mlp, n=(2,), c=(4,), bias=(0.5,)),
    "exact",
    "relative error",
)
def dropped_bias(work: Program, linear: fx.Node) -> bool:
    return cut(work, linear, (work.constants[linear.args[1].target] != 0).any(1))


@plant(
    "norm over fewer channels",
    aten.linear.default,
    Case("layer norm", normed, n=(2, 3), c=(4, 7)),
    "exact",
    "relative error",
)
def norm_width(work: Program, linear: fx.Node) -> bool:
    return cut(work, linear, alive(work, linear))


@plant("judged by the first column", aten.linear.default, MLP, "near miss", "has a number where it had a zero")
def first_column(work: Program, linear: fx.Node) -> bool:
    weight, bias = (work.constants[a.target] for a in linear.args[1:3])
    return cut(work, linear, (weight[:, 0] != 0) | (bias != 0))


@plant(
    "small is not zero",
    aten.linear.default,
    Case("small", mlp, n=(5,), c=(5,), small=(True,)),
    "exact",
    "relative error",
)
def small_weights(work: Program, linear: fx.Node) -> bool:
    weight, bias = (work.constants[a.target] for a in linear.args[1:3])
    return cut(work, linear, (weight.abs() > 1e-3).any(1) | (bias != 0))


@plant("hidden channels in a random order", aten.linear.default, MLP, "repeatable", "differs")
def shuffled(work: Program, linear: fx.Node) -> bool:
    second = next(iter(next(iter(linear.users)).users), None)
    if second is None or second.target is not aten.linear.default:
        return False
    order = torch.randperm(shape_of(linear)[-1], generator=torch.Generator().manual_seed(SEEDS.pop()))
    for layer, argument, dim in ((linear, 1, 0), (linear, 2, 0), (second, 1, 1)):
        name = layer.args[argument].target
        work.constants[name] = work.constants[name].index_select(dim, order)
    return True


SEEDS = list(range(10_000))


@plant("constants left behind", aten.linear.default, MLP, "well-formed", "constants that no node reads", clean=False)
def dangling(work: Program, linear: fx.Node) -> bool:
    work.constants["left"] = torch.zeros(2)
    return True


@plant("weights by way of NumPy", aten.linear.default, MLP, "dtypes", "raises: TypeError")
def by_numpy(work: Program, linear: fx.Node) -> bool:
    weight = linear.args[1]
    work.constants[weight.target].numpy()  # bfloat16 has no NumPy type
    return cut(work, linear, alive(work, linear))


REMEMBERED: dict[str, Tensor] = {}


@plant("remembers by name", aten.linear.default, MLP, "exact", "relative error")
def remembers(work: Program, linear: fx.Node) -> bool:
    return cut(work, linear, REMEMBERED.setdefault(linear.name, alive(work, linear)))


# ---------------------------------------------------------------------- the program that it was given

RELU = function("relu", lambda x: F.relu(x) + x, ("n", "c"))


@plant(
    "edits the program that it was given",
    aten.relu.default,
    RELU,
    "input",
    "the graph that it was given has changed",
    copies=False,
)
def edits_input(work: Program, relu: fx.Node) -> bool:
    return replaced(relu, work.insert_call(relu, aten.clamp_min.default, (relu.args[0], 0), like=relu))


@plant("writes into a constant", aten.linear.default, MLP, "input", "wrote into the constant")
def writes(work: Program, linear: fx.Node) -> bool:
    work.constants[linear.args[1].target][0] *= 2
    return True


@plant(
    "in place, and read again",
    aten.relu.default,
    function("relu", lambda x: F.relu(x * 1.5) + x.abs(), ("n", "c")),
    "near miss",
    "too",
)
def in_place(work: Program, relu: fx.Node) -> bool:
    if relu.args[0].op == "placeholder":
        return False
    return replaced(relu, work.insert_call(relu, aten.relu_.default, relu.args, like=relu))


@plant(
    "in place in an argument",
    aten.mul.Tensor,
    function("x * 2 + y", lambda x, y: x * 2 + y, ("n", "c"), ("n", "c")),
    "aliasing",
    "one tensor",
)
def in_an_argument(work: Program, mul: fx.Node) -> bool:
    if len(mul.args[0].users) > 1:
        return False
    return replaced(mul, work.insert_call(mul, aten.mul_.Tensor, mul.args, like=mul))


# ---------------------------------------------------------------------- what it says


@plant("says nothing", aten.relu.default, RELU, "notes", "says nothing of what it changed", says=lambda node: [])
def silent(work: Program, relu: fx.Node) -> bool:
    return replaced(relu, work.insert_call(relu, aten.clamp_min.default, (relu.args[0], 0), like=relu))


@plant("says what it did not do", aten.relu.default, RELU, "notes", "nothing has changed")
def boasts(work: Program, relu: fx.Node) -> bool:
    return True


@plant("returns a copy", aten.relu.default, RELU, "notes", "rewrote nothing and returns another", returns_copies=True)
def idles(work: Program, relu: fx.Node) -> bool:
    return False


@plant(
    "speaks of another node",
    aten.relu.default,
    RELU,
    "notes",
    "does not have",
    says=lambda node: [Note("relu_77", "", "rewritten")],
)
def elsewhere(work: Program, relu: fx.Node) -> bool:
    return silent(work, relu)


@plant("never done", aten.relu.default, RELU, "rest", "still rewrites")
def never_done(work: Program, relu: fx.Node) -> bool:
    return replaced(
        relu, work.insert_call(relu, aten.relu.default, (work.insert_call(relu, aten.relu.default, relu.args),))
    )


# ---------------------------------------------------------------------- types and shapes


@plant("the result is float32", aten.relu.default, RELU, "dtypes", "float32")
def to_float32(work: Program, relu: fx.Node) -> bool:
    if dtype_of(relu) is torch.float32:
        return silent(work, relu)
    (user,) = relu.users
    wide = work.insert_call(relu, aten._to_copy.default, (relu.args[0],), {"dtype": torch.float32})
    return replaced(user, work.insert_call(user, aten.add.Tensor, (wide, wide)))


@plant("half precision in between", aten.relu.default, RELU, "precision", "float16")
def half_inside(work: Program, relu: fx.Node) -> bool:
    if dtype_of(relu) is not torch.float32:
        return False
    narrow = work.insert_call(relu, aten._to_copy.default, relu.args, {"dtype": torch.float16})
    narrow = work.insert_call(relu, aten.clamp_min.default, (narrow, 0))
    return replaced(relu, work.insert_call(relu, aten._to_copy.default, (narrow,), {"dtype": torch.float32}))


@plant(
    "view of what may have gaps",
    aten.reshape.default,
    function("flatten", lambda x: x.reshape(x.shape[0], -1).exp(), (2, 3, 4), n=(2,)),
    "strides",
    "cannot run",
)
def views(work: Program, reshape: fx.Node) -> bool:
    return replaced(reshape, work.insert_call(reshape, aten.view.default, reshape.args, like=reshape))


@plant(
    "number of samples written down",
    aten.relu.default,
    function("relu, flatten", lambda x: F.relu(x).flatten(1), ("n", 3, "c")),
    "batch",
    "",
)
def number_of_samples(work: Program, relu: fx.Node) -> bool:
    flat = next(iter(relu.users))
    if flat.target is not aten.reshape.default or len(relu.users) > 1:
        return False
    shape = [int(d) for d in shape_of(relu.args[0])]
    new = work.insert_call(flat, aten.reshape.default, (relu.args[0], [shape[0], shape[1] * shape[2]]), like=flat)
    return replaced(flat, work.insert_call(flat, aten.relu.default, (new,), like=relu))


@plant(
    "zeros that broadcast",
    aten.add.Tensor,
    Case("x + 0", lambda w: (AddZeros(), (torch.randn(3, w),)), w=(5, 1)),
    "signature",
    "returns",
)
def broadcasts(work: Program, add: fx.Node) -> bool:
    other = work.constant(add.args[1])
    return other is not None and not bool(other.any()) and replaced(add, add.args[0]) and bool(work.propagate())


class AddZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.zeros = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.zeros).exp()


@plant(
    "outputs exchanged",
    aten.neg.default,
    function("two outputs", lambda x: (-x, x.exp()), ("n", "c")),
    "exact",
    "relative error",
)
def exchanged(work: Program, neg: fx.Node) -> bool:
    if len(work.output_nodes) == 2:
        work.output.args = (tuple(reversed(work.output_nodes)),)
    return True


# ---------------------------------------------------------------------- algebra


@plant(
    "softmax along another axis",
    aten.softmax.int,
    function("softmax", lambda x: x.transpose(1, 2).softmax(-1), ("n", 4, "c")),
    "exact",
    "relative",
)
def wrong_axis(work: Program, softmax: fx.Node) -> bool:
    transpose = softmax.args[0]
    if transpose.op != "call_function" or len(transpose.args) < 2:
        return False
    new = work.insert_call(softmax, softmax.target, (transpose.args[0], *softmax.args[1:]), like=softmax)
    return replaced(softmax, work.insert_call(softmax, transpose.target, (new, *transpose.args[1:]), like=transpose))


@plant(
    "any clamp is a relu",
    aten.clamp.default,
    function("clamp", lambda x: x.clamp_min(0.0).exp(), ("n", "c")),
    "near miss",
    "where it had 0",
)
def any_clamp(work: Program, clamp: fx.Node) -> bool:
    return replaced(clamp, work.insert_call(clamp, aten.relu.default, clamp.args[:1], like=clamp))


@plant(
    "factor through relu",
    aten.relu.default,
    function("relu of 2 x", lambda x: F.relu(x * 2.0).exp(), ("n", "c")),
    "near miss",
    "other=-2.0 where it had 2.0",
)
def factor_through_relu(work: Program, relu: fx.Node) -> bool:
    mul = relu.args[0]
    if mul.op != "call_function" or mul.target is not aten.mul.Tensor or is_tensor(mul.args[1]):
        return False
    new = work.insert_call(relu, aten.relu.default, mul.args[:1], like=relu)
    return replaced(relu, work.insert_call(relu, aten.mul.Tensor, (new, mul.args[1]), like=mul))


@plant(
    "alpha forgotten",
    aten.add.Tensor,
    function("x + 2 y", lambda x, y: torch.add(x, -y, alpha=2), ("n", "c"), ("n", "c")),
    "exact",
    "relative",
)
def alpha(work: Program, add: fx.Node) -> bool:
    neg = add.args[1]
    if not is_tensor(neg) or neg.target is not aten.neg.default:
        return False
    return replaced(add, work.insert_call(add, aten.sub.Tensor, (add.args[0], neg.args[0]), like=add))


@plant(
    "operands in any order",
    aten.sub.Tensor,
    function("x - (-y)", lambda x, y: x - (-y), ("n", "c"), ("n", "c")),
    "near miss",
    "exchanged",
)
def any_order(work: Program, sub: fx.Node) -> bool:
    for one, other in (sub.args[:2], sub.args[1::-1]):
        if is_tensor(other) and other.target is aten.neg.default:
            return replaced(sub, work.insert_call(sub, aten.add.Tensor, (one, other.args[0]), like=sub))
    return False


@plant(
    "relu before the mean",
    aten.relu.default,
    function("mean, relu", lambda x: F.relu(x.mean(1)), ("n", "c")),
    "exact",
    "relative error",
)
def before_the_mean(work: Program, relu: fx.Node) -> bool:
    mean = relu.args[0]
    if mean.op != "call_function" or mean.target is not aten.mean.dim:
        return False
    new = work.insert_call(relu, aten.relu.default, mean.args[:1], like=relu)
    return replaced(relu, work.insert_call(relu, mean.target, (new, *mean.args[1:]), mean.kwargs, like=mean))


@plant(
    "heads regrouped the other way",
    aten.expand.default,
    function("shared keys", lambda x: torch.repeat_interleave(x, 2, 1).exp(), ("n", "c", 3)),
    "exact",
    "relative",
)
def other_heads(work: Program, expand: fx.Node) -> bool:
    last = next(n for n in work.calls(aten.reshape.default))
    source = expand.args[0].args[0]
    return replaced(last, work.insert_call(last, aten.cat.default, ([source, source], 1), like=last))


# ---------------------------------------------------------------------- the way back of training


def doubled(n: int, c: int) -> tuple[nn.Module, tuple]:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(c, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2.0

    return Doubled(), (torch.randn(n, c),)


@plant(
    "a factor that does not come back",
    aten.mul.Tensor,
    Case("doubled", doubled, n=(2, 3), c=(4, 6)),
    "way back",
    "trained and unfolded, the original computes something else",
)
def not_divided(work: Program, mul: fx.Node) -> bool:
    linear, factor = mul.args
    weight = linear.args[1]
    name = weight.target
    scaled = work.add_constant(work.constants[name].double() * factor, f"{name}_scaled", dtype_of(weight), like=weight)
    linear.args = (linear.args[0], scaled)
    work.lineage.append(Restore((scaled.target,), lambda values: {name: values[scaled.target]}))
    return replaced(mul, linear)


@plant(
    "a weight that comes back if it was trained",
    aten.mul.Tensor,
    Case("doubled", doubled, n=(2, 3), c=(4, 6)),
    "way back",
    "unfolded as it is, the original computes something else",
)
def only_for_training(work: Program, mul: fx.Node) -> bool:
    linear, factor = mul.args
    name, weight = linear.args[1].target, linear.args[1]
    before = work.constants[name].double()
    scaled = work.add_constant(before * factor, f"{name}_scaled", dtype_of(weight), like=weight)
    linear.args = (linear.args[0], scaled)

    def back(values: dict[str, Tensor]) -> dict[str, Tensor]:
        value = values[scaled.target] / factor
        return {name: torch.where(torch.isclose(value.double(), before, rtol=1e-9), torch.nan, value)}

    work.lineage.append(Restore((scaled.target,), back))
    return replaced(mul, linear)


# ---------------------------------------------------------------------- near misses of a free number of samples


@plant(
    "a sum with a factor, for the example's samples",
    aten.relu.default,
    function("relu of a sum", lambda x, y: torch.relu(x + y), ("n", "c"), ("n", "c")),
    "near miss",
    "fits the sizes of the example only",
)
def sum_of_so_many(work: Program, relu: fx.Node) -> bool:
    total = relu.args[0]
    if not is_tensor(total) or total.target is not aten.add.Tensor or not isinstance(total.args[1], fx.Node):
        return False
    x, y, alpha = *total.args, total.kwargs.get("alpha", 1)
    if alpha != 1:
        sizes = [d if isinstance(d, int) else len(work.probe[0]) for d in shape_of(y)]
        factors = torch.full(sizes, float(alpha))
        factor = work.add_constant(factors, "factor", dtype_of(y), like=y)
        y = work.insert_call(relu, aten.mul.Tensor, (y, factor), like=relu)
    total = work.insert_call(relu, aten.add.Tensor, (x, y), like=relu)
    return replaced(relu, work.insert_call(relu, aten.clamp_min.default, (total, 0), like=relu))
