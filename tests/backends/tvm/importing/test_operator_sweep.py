"""Every operator against eager: a few hundred one-operator modules through capture, TVM and back.

The stock importer is silently wrong in places; this sweep is what keeps the whole path honest. A case is a function and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thresher.backends.tvm import TVMBackend
from thresher.frontend.capture import capture
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import LOWERING_TOLERANCE, compare

CASES: dict[str, tuple[Callable, tuple]] = {}


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ints(*shape: int, low: int = 0, high: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def case(name: str, function: Callable, *inputs: Tensor) -> None:
    assert name not in CASES, name
    CASES[name] = (function, inputs)


class Layer(nn.Module):
    """A function, and the weights it needs as parameters, so that they are constants of the graph."""

    def __init__(self, function: Callable, weights: tuple[Tensor, ...] = ()):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in weights])

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.weights)


def layer(name: str, function: Callable, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> None:
    case(name, Layer(function, weights), *inputs)


# ---------------------------------------------------------------------- elementwise

UNARY = {
    "abs": torch.abs,
    "neg": torch.neg,
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "square": torch.square,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "elu_2": lambda x: F.elu(x, 2.0),
    "selu": F.selu,
    "celu": F.celu,
    "celu_half": lambda x: F.celu(x, 0.5),
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus_2": lambda x: F.softplus(x, 2.0, 1.0),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "hardtanh_2": lambda x: F.hardtanh(x, -0.3, 0.7),
    "leaky_relu": F.leaky_relu,
    "leaky_relu_3": lambda x: F.leaky_relu(x, 0.3),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "softshrink_1": lambda x: F.softshrink(x, 0.1),
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.2, 0.0),
    "threshold_7": lambda x: F.threshold(x, 0.2, 7.0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp(min=-0.1),
    "clamp_max": lambda x: x.clamp(max=0.1),
    "expm1": torch.expm1,
    "reciprocal_shifted": lambda x: torch.reciprocal(x.abs() + 1),
    "rsqrt_shifted": lambda x: torch.rsqrt(x.abs() + 1),
    "sqrt_abs": lambda x: x.abs().sqrt(),
    "log_shifted": lambda x: torch.log(x.abs() + 0.1),
    "log1p_abs": lambda x: torch.log1p(x.abs()),
    "log2_shifted": lambda x: torch.log2(x.abs() + 0.1),
    "pow_2": lambda x: x**2,
    "pow_3": lambda x: x**3,
    "pow_half": lambda x: x.abs() ** 0.5,
    "add_scalar": lambda x: x + 1.5,
    "sub_scalar": lambda x: x - 1.5,
    "rsub_scalar": lambda x: 1.5 - x,
    "mul_scalar": lambda x: x * 2.5,
    "div_scalar": lambda x: x / 3,
    "rdiv": lambda x: 2.0 / (x.abs() + 1),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "isnan": torch.isnan,
    "gt_scalar": lambda x: x > 0.1,
    "eq_scalar": lambda x: x == 0,
    "logical_not": lambda x: torch.logical_not(x > 0),
    "to_int": lambda x: (x * 5).to(torch.int64),
    "to_double": lambda x: x.double(),
    "to_half": lambda x: x.half(),
    "masked_fill": lambda x: x.masked_fill(x > 0, -2.0),
    "where": lambda x: torch.where(x > 0, x, -x),
    "zeros_like": lambda x: x + torch.zeros_like(x),
    "ones_like": lambda x: x * torch.ones_like(x),
    "full_like": lambda x: x + torch.full_like(x, 3.0),
    "new_ones": lambda x: x + x.new_ones(x.shape),
    "dropout_eval": lambda x: F.dropout(x, 0.5, False),
    "nan_to_num": torch.nan_to_num,
    "sigmoid_mul": lambda x: x * torch.sigmoid(1.702 * x),
}
for _name, _f in UNARY.items():
    case(f"{_name}-vector", _f, rand(37))
    case(f"{_name}-image", _f, rand(2, 3, 5, 7))
for _name in (
    "exp",
    "erf",
    "tanh",
    "sigmoid",
    "gelu",
    "silu",
    "relu",
    "relu6",
    "elu",
    "hardswish",
    "mish",
    "softplus",
    "selu",
):
    case(f"{_name}-large", UNARY[_name], rand(64) * 60)
for _name in (
    "abs",
    "relu",
    "relu6",
    "neg",
    "clamp",
    "exp",
    "sigmoid",
    "gelu",
    "add_scalar",
    "mul_scalar",
    "hardshrink",
):
    case(f"{_name}-float64", UNARY[_name], rand(3, 33, dtype=torch.float64))
for _name in (
    "relu",
    "relu6",
    "clamp",
    "exp",
    "tanh",
    "sigmoid",
    "hardtanh",
    "silu",
    "erf",
    "gelu",
    "leaky_relu",
    "elu",
):
    # torch's own vectorised gelu makes NaN of infinity, and infinity of 3e38, on some CPUs and not on others: there it is no reference
    _ends, _largest = (50.0, 1e38) if _name == "gelu" else (float("inf"), 3e38)
    case(
        f"{_name}-special",
        UNARY[_name],
        torch.tensor([float("nan"), _ends, -_ends, 0.0, -0.0, 1e-40, -1e-40, _largest] * 4),
    )

BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 1),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "add_alpha": lambda a, b: torch.add(a, b, alpha=2.5),
    "sub_alpha": lambda a, b: torch.sub(a, b, alpha=0.5),
    "pow": lambda a, b: (a.abs() + 0.1) ** b,
    "lt": torch.lt,
    "ge": torch.ge,
    "ne": torch.ne,
    "logical_and": lambda a, b: (a > 0) & (b > 0),
    "logical_or": lambda a, b: (a > 0) | (b < 0),
    "truth values multiplied": lambda a, b: torch.where((a > 0) * (b < 0) * True, a, b),
    "truth values added": lambda a, b: ~((a > 0) + (b < 0)),
    "where_two": lambda a, b: torch.where(a > b, a, b),
    "atan2": torch.atan2,
    "fmod": lambda a, b: torch.fmod(a, b.abs() + 0.5),
    "remainder": lambda a, b: torch.remainder(a, b.abs() + 0.5),
}
for _name, _f in BINARY.items():
    case(f"{_name}-same", _f, rand(3, 17), rand(3, 17, seed=1))
    case(f"{_name}-broadcast", _f, rand(4, 1, 5), rand(3, 1, seed=1))
case("int-true-division", lambda a, b: a / b, ints(9, low=1), ints(9, low=1, seed=1))
case("int-floor-division", lambda a, b: a // b, ints(9, low=1, high=50), ints(9, low=1, seed=1))
case("int-mixed-add", lambda a, b: a + b, ints(9), rand(9))
case("int-compare-float", lambda a, b: a > b, ints(9), rand(9))
case("bool-times-float", lambda a: a * (a > 0), rand(19))

# ---------------------------------------------------------------------- movement

X = rand(2, 3, 4, 5)
MOVEMENT = {
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "transpose": lambda x: x.transpose(-1, 1),
    "reshape": lambda x: x.reshape(6, -1),
    "flatten": lambda x: x.flatten(1),
    "view_split": lambda x: x.view(2, 3, 2, 2, 5),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 6, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "flip": lambda x: x.flip(1, 3),
    "roll": lambda x: x.roll((1, -2), (1, 3)),
    "slice": lambda x: x[:, 1:, 1:3],
    "slice_step": lambda x: x[..., ::2],
    "slice_negative": lambda x: x[:, -2:],
    "select": lambda x: x[:, 1],
    "select_negative": lambda x: x[:, -1],
    "select_negative_last": lambda x: x[..., -2],
    "index_negative": lambda x: x[:, torch.tensor([0, -1])],
    "index_two": lambda x: x[torch.tensor([1, 0]), torch.tensor([2, -1])],
    "index_matrix": lambda x: x[:, :, torch.tensor([[0, 1], [2, 3]])],
    "index_select": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "cat": lambda x: torch.cat([x, x + 1], 1),
    "cat_negative": lambda x: torch.cat([x, x * 2], -1),
    "stack": lambda x: torch.stack([x, -x], 2),
    "split": lambda x: x.split(2, 3)[1],
    "split_sizes": lambda x: x.split([1, 3], 2)[1],
    "chunk": lambda x: x.chunk(2, 1)[0],
    "unbind": lambda x: x.unbind(2)[1],
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_value": lambda x: F.pad(x, (1, 0, 2, 2), value=3.0),
    "pad_crop": lambda x: F.pad(x, (-1, 1, 0, -1)),
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 12, 2, 5), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.reshape(2, 3, 2, 10), 2),
    "channel_shuffle": lambda x: x.view(2, 3, 2, 2, 5).transpose(1, 2).flatten(1, 2),
    "tril": torch.tril,
    "triu": lambda x: torch.triu(x, 1),
    "clone": lambda x: x.clone(),
    "movedim": lambda x: x.movedim(1, -1),
    "narrow": lambda x: x.narrow(2, 1, 2),
    "unflatten": lambda x: x.flatten(0, 1).unflatten(0, (3, 2)),
    "glu": lambda x: F.glu(x.reshape(2, 3, 2, 10), -1),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "gather": lambda x: x.gather(1, torch.zeros(2, 2, 4, 5, dtype=torch.int64)),
}
for _name, _f in MOVEMENT.items():
    case(f"{_name}-move", _f, X)
case("permute-int", lambda x: x.permute(1, 0), ints(3, 4))
case("cat-int", lambda x: torch.cat([x, x], 0), ints(3, 4))

# ---------------------------------------------------------------------- reductions, norms, softmax

REDUCTIONS = {
    "mean": torch.mean,
    "sum": torch.sum,
    "mean_dim": lambda x: x.mean(1),
    "mean_dims": lambda x: x.mean((2, 3)),
    "mean_keep": lambda x: x.mean((2, 3), keepdim=True),
    "mean_last": lambda x: x.mean(-1),
    "sum_dims": lambda x: x.sum((0, 2)),
    "amax": lambda x: x.amax(1),
    "amin_keep": lambda x: x.amin((1, 3), keepdim=True),
    "max_all": torch.max,
    "max_dim": lambda x: x.max(1).values,
    "min_dim": lambda x: x.min(-1).values,
    "argmax": lambda x: x.argmax(1),
    "argmin_last": lambda x: x.argmin(-1),
    "prod": lambda x: x.prod(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std((2, 3)),
    "var_biased": lambda x: x.var(-1, correction=0),
    "logsumexp": lambda x: x.logsumexp(-1),
    "norm": lambda x: x.norm(dim=-1),
    "norm_1": lambda x: x.norm(1, dim=1),
    "cumsum": lambda x: x.cumsum(2),
    "any": lambda x: (x > 2).any(1),
    "all": lambda x: (x > -2).all(1),
    "softmax": lambda x: x.softmax(-1),
    "softmax_1": lambda x: x.softmax(1),
    "softmax_large": lambda x: (100 * x).softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax_masked": lambda x: x.masked_fill(x > 1, float("-inf")).softmax(-1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "sum_int": lambda x: (x > 0).sum(1),
    "topk_values": lambda x: x.topk(2, -1).values,
    "topk_any_order": lambda x: x.topk(3, 1, sorted=False).values.sort(1).values,
    "topk_smallest": lambda x: tuple(x.topk(2, -1, largest=False)),
    "histc": lambda x: x.histc(7, -1.5, 2.0),
    "sort": lambda x: x.sort(-1).values,
    "count": lambda x: (x > 0).float().mean((1, 2)),
}
for _name, _f in REDUCTIONS.items():
    case(f"{_name}-small", _f, X)
    case(f"{_name}-odd", _f, rand(1, 33, 19, 23))
for _size in (1, 7, 16, 48, 197):
    case(f"softmax-row{_size}", lambda x: x.softmax(-1), rand(3, 5, _size))
    layer(
        f"layer_norm-{_size}",
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        (rand(4, _size) + 3,),
        (rand(_size, seed=1), rand(_size, seed=2)),
    )
    layer(f"rms_norm-{_size}", lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), (rand(4, _size),), (rand(_size, seed=1),))
case("layer_norm-plain", lambda x: F.layer_norm(x, (24,)), rand(5, 24))
layer("layer_norm-weight-only", lambda x, w: F.layer_norm(x, (24,), w), (rand(5, 24),), (rand(24, seed=1),))
layer(
    "layer_norm-two-dims",
    lambda x, w, b: F.layer_norm(x, (6, 8), w, b),
    (rand(5, 6, 8),),
    (rand(6, 8, seed=1), rand(6, 8, seed=2)),
)
layer("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (rand(2, 6, 5, 5),), (rand(6, seed=1), rand(6, seed=2)))
case("group_norm-plain", lambda x: F.group_norm(x, 3), rand(2, 6, 5, 5))
case("instance_norm", F.instance_norm, rand(2, 6, 5, 5))
layer(
    "batch_norm-eval",
    lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b),
    (rand(2, 6, 5, 5),),
    (rand(6), rand(6, seed=1).abs() + 0.5, rand(6, seed=2), rand(6, seed=3)),
)

# ---------------------------------------------------------------------- products

for _m, _k, _n in (
    (1, 7, 5),
    (1, 64, 1000),
    (2, 16, 16),
    (5, 33, 17),
    (64, 64, 64),
    (197, 192, 96),
    (49, 2304, 64),
    (13, 1100, 40),
    (3, 1, 4),
):
    layer(
        f"linear-{_m}x{_k}x{_n}",
        lambda x, w, b: F.linear(x, w, b),
        (rand(_m, _k),),
        (rand(_n, _k, seed=1), rand(_n, seed=2)),
    )
layer("linear-3d", lambda x, w: F.linear(x, w), (rand(2, 9, 20),), (rand(31, 20, seed=1),))
layer("linear-4d", lambda x, w, b: F.linear(x, w, b), (rand(2, 3, 4, 20),), (rand(8, 20, seed=1), rand(8, seed=2)))
layer("linear-1d", lambda x, w, b: F.linear(x, w, b), (rand(20),), (rand(8, 20, seed=1), rand(8, seed=2)))
layer(
    "linear-relu-add",
    lambda x, y, w, b: F.relu(F.linear(x, w, b)) + y,
    (rand(7, 20), rand(7, 24, seed=3)),
    (rand(24, 20, seed=1), rand(24, seed=2)),
)
layer(
    "linear-float64",
    lambda x, w, b: F.linear(x, w, b),
    (rand(4, 9, dtype=torch.float64),),
    (rand(5, 9, dtype=torch.float64), rand(5, dtype=torch.float64)),
)
layer(
    "linear-float16",
    lambda x, w, b: F.linear(x, w, b),
    (rand(4, 32, dtype=torch.float16),),
    (rand(8, 32, dtype=torch.float16), rand(8, dtype=torch.float16)),
)
layer("matmul-constant", lambda x, w: x @ w, (rand(2, 5, 12),), (rand(12, 9, seed=1),))
layer("addmm", lambda x, b, w: torch.addmm(b, x, w), (rand(5, 12),), (rand(9), rand(12, 9, seed=1)))
case("matmul-2d", torch.matmul, rand(5, 12), rand(12, 9, seed=1))
case("matmul-batched", torch.matmul, rand(2, 3, 5, 12), rand(2, 3, 12, 9, seed=1))
case("matmul-broadcast", torch.matmul, rand(2, 3, 5, 12), rand(12, 9, seed=1))
case(
    "matmul-transposed",
    lambda a, b: torch.relu(a @ b.transpose(-1, -2)) + 1,
    rand(2, 3, 19, 33),
    rand(2, 3, 21, 33, seed=1),
)
case("matmul-permuted", lambda a, b: a @ b.permute(0, 2, 1), rand(3, 7, 12), rand(3, 35, 12, seed=1))
case("matmul-broadcast-left", lambda a, b: (a @ b).softmax(-1), rand(2, 1, 6, 8), rand(3, 8, 17, seed=1))
case("matmul-both-computed", lambda a, b: (a + 1) @ torch.tanh(b), rand(4, 40, 64), rand(4, 64, 50, seed=1))
case("matmul-double", torch.matmul, rand(5, 12).double(), rand(12, 9, seed=1).double())
case("bmm", torch.bmm, rand(3, 5, 12), rand(3, 12, 9, seed=1))
case(
    "baddbmm",
    lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2.0),
    rand(3, 5, 9),
    rand(3, 5, 12),
    rand(3, 12, 9, seed=1),
)
case("einsum", lambda a, b: torch.einsum("bhld,bhsd->bhls", a, b), rand(2, 3, 5, 4), rand(2, 3, 6, 4, seed=1))
case("outer", torch.outer, rand(5), rand(7, seed=1))
layer("embedding", lambda i, w: F.embedding(i, w), (ints(2, 5, high=11),), (rand(11, 6),))

CONVOLUTIONS = {
    "1x1": ((2, 8, 6, 6), (12, 8, 1, 1), {}),
    "3x3": ((1, 8, 9, 9), (16, 8, 3, 3), {"padding": 1}),
    "stem": ((1, 3, 33, 33), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "stride": ((2, 5, 11, 13), (7, 5, 3, 3), {"stride": (2, 3)}),
    "dilated": ((1, 4, 12, 12), (6, 4, 3, 3), {"dilation": 2, "padding": 2}),
    "asymmetric": ((1, 4, 9, 12), (6, 4, 1, 5), {"padding": (0, 2)}),
    "grouped": ((2, 8, 7, 7), (12, 4, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((1, 24, 9, 9), (24, 1, 3, 3), {"groups": 24, "padding": 1}),
    "depthwise-stride": ((2, 17, 10, 10), (17, 1, 5, 5), {"groups": 17, "padding": 2, "stride": 2}),
    "multiplier": ((1, 6, 8, 8), (12, 1, 3, 3), {"groups": 6}),
    "same": ((1, 4, 8, 8), (4, 4, 3, 3), {"padding": "same"}),
    "same-even": ((1, 4, 8, 8), (4, 4, 4, 4), {"padding": "same"}),
    "deep": ((1, 160, 5, 5), (24, 160, 3, 3), {"padding": 1}),
    "patch": ((1, 3, 32, 32), (48, 3, 8, 8), {"stride": 8}),
}
for _name, (_x, _w, _options) in CONVOLUTIONS.items():
    layer(
        f"conv2d-{_name}",
        lambda x, w, b, o=_options: F.conv2d(x, w, b, **o),
        (rand(*_x),),
        (rand(*_w, seed=1), rand(_w[0], seed=2)),
    )
    layer(f"conv2d-{_name}-bare", lambda x, w, o=_options: F.conv2d(x, w, **o), (rand(*_x),), (rand(*_w, seed=1),))
layer(
    "conv2d-relu-residual",
    lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1) + x),
    (rand(1, 16, 8, 8),),
    (rand(16, 16, 3, 3, seed=1), rand(16, seed=2)),
)
layer(
    "conv2d-float64",
    lambda x, w: F.conv2d(x, w),
    (rand(1, 3, 6, 6, dtype=torch.float64),),
    (rand(4, 3, 3, 3, dtype=torch.float64),),
)
layer(
    "conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), (rand(2, 5, 11),), (rand(7, 5, 3, seed=1), rand(7, seed=2))
)
layer(
    "conv1d-stride",
    lambda x, w, b: F.conv1d(x, w, b, stride=2),
    (rand(2, 5, 11),),
    (rand(7, 5, 3, seed=1), rand(7, seed=2)),
)
layer("conv1d-depthwise", lambda x, w: F.conv1d(x, w, groups=6, padding=2), (rand(2, 6, 11),), (rand(6, 1, 5, seed=1),))
layer(
    "conv3d",
    lambda x, w, b: F.conv3d(x, w, b, padding=1),
    (rand(1, 3, 5, 6, 7),),
    (rand(4, 3, 3, 3, 3, seed=1), rand(4, seed=2)),
)
layer(
    "conv3d-stride",
    lambda x, w, b: F.relu(F.conv3d(x, w, b, stride=(1, 2, 2), padding=(0, 1, 1), groups=2)),
    (rand(1, 4, 5, 6, 7),),
    (rand(6, 2, 3, 3, 3, seed=1), rand(6, seed=2)),
)
layer(
    "conv1d-chain",
    lambda x, w, b, v: F.max_pool1d(F.gelu(F.conv1d(F.relu(F.conv1d(x, w, b, padding=1)), v, dilation=2)), 2),
    (rand(2, 5, 21),),
    (rand(7, 5, 3, seed=1), rand(7, seed=2), rand(4, 7, 3, seed=3)),
)
layer(
    "conv1d-to-tokens",
    lambda x, w, v: F.linear(F.conv1d(x.transpose(1, 2), w, padding="same").transpose(1, 2), v),
    (rand(2, 9, 6),),
    (rand(6, 3, 3, seed=1)[:, :3].repeat(1, 2, 1), rand(5, 6, seed=2)),
)
layer(
    "conv1d-mean",
    lambda x, w, s: (F.conv1d(x, w) * s).mean(-1),
    (rand(2, 5, 11),),
    (rand(7, 5, 3, seed=1), rand(7, 1, seed=2)),
)
layer(
    "conv1d-pad-cat-slice",
    lambda x, w: torch.cat([F.pad(F.conv1d(x, w), (1, 2), value=0.5)[:, 1:], x[:, :2]], 1).amax(1, keepdim=True),
    (rand(2, 5, 11),),
    (rand(7, 5, 4, seed=1),),
)
layer("conv1d-double", lambda x, w: F.conv1d(x, w), (rand(1, 3, 9, dtype=torch.float64),), (rand(4, 3, 3).double(),))
layer(
    "conv3d-pool-mean",
    lambda x, w: F.avg_pool3d(F.max_pool3d(F.conv3d(x, w, padding=1), 2, ceil_mode=True), 2).mean((2, 3, 4)),
    (rand(1, 3, 5, 8, 9),),
    (rand(4, 3, 3, 3, 3, seed=1),),
)
layer(
    "conv3d-elementwise",
    lambda x, w, s: torch.sigmoid(F.conv3d(x, w)) * s + 1,
    (rand(1, 3, 5, 6, 7),),
    (rand(4, 3, 2, 2, 2, seed=1), rand(4, 1, 1, 1, seed=2)),
)
layer(
    "conv_transpose1d",
    lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1, output_padding=1),
    (rand(1, 4, 7),),
    (rand(4, 5, 3, seed=1), rand(5, seed=2)),
)
layer(
    "conv_transpose1d-steps",
    lambda x, w, b: F.conv_transpose1d(x, w, b, stride=4),
    (rand(2, 4, 7),),
    (rand(4, 5, 4, seed=1), rand(5, seed=2)),
)
layer(
    "conv_transpose3d",
    lambda x, w, b: F.conv_transpose3d(x, w, b, stride=2, padding=1),
    (rand(1, 4, 3, 4, 5),),
    (rand(4, 3, 3, 3, 3, seed=1), rand(3, seed=2)),
)
TRANSPOSED = {
    "2x2": ((1, 8, 5, 5), (8, 6, 2, 2), {"stride": 2}),
    "3x3": ((1, 4, 5, 6), (4, 5, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "plain": ((2, 4, 5, 5), (4, 3, 3, 3), {}),
    "grouped": ((1, 6, 5, 5), (6, 2, 3, 3), {"groups": 3, "stride": 2}),
    "wide-groups": ((1, 6, 5, 5), (6, 40, 3, 3), {"groups": 3, "stride": 2}),
    "depthwise": (
        (2, 20, 5, 4),
        (20, 1, 4, 3),
        {"groups": 20, "stride": (2, 3), "padding": (1, 0), "output_padding": (1, 0)},
    ),
    "dilated": ((1, 4, 5, 5), (4, 3, 3, 3), {"dilation": 2}),
    "padded": ((1, 4, 6, 6), (4, 3, 3, 3), {"padding": 2}),
}
for _name, (_x, _w, _options) in TRANSPOSED.items():
    _outs = _w[1] * _options.get("groups", 1)
    layer(
        f"conv_transpose2d-{_name}",
        lambda x, w, b, o=_options: F.conv_transpose2d(x, w, b, **o),
        (rand(*_x),),
        (rand(*_w, seed=1), rand(_outs, seed=2)),
    )

# ---------------------------------------------------------------------- pools and resizes

IMAGE = rand(2, 6, 11, 13)
POOLS = {
    "max": lambda x: F.max_pool2d(x, 2),
    "max-padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max-ceil": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "max-dilated": lambda x: F.max_pool2d(x, 3, 1, 0, 2),
    "max-larger-than-the-image": lambda x: F.max_pool2d(x, (99, 2), 1, (49, 0), ceil_mode=True),
    "avg-larger-than-the-image": lambda x: F.avg_pool2d(x, 99, 2, 49, ceil_mode=True, count_include_pad=False),
    "avg-larger-one-way": lambda x: F.avg_pool2d(x, (3, 64), 1, (1, 32)),
    "avg": lambda x: F.avg_pool2d(x, 2),
    "avg-padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg-no-pad-count": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "avg-ceil": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "avg-ceil-padded": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg-divisor": lambda x: F.avg_pool2d(x, 3, 2, divisor_override=5),
    "adaptive-1": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive-divides": lambda x: F.adaptive_avg_pool2d(x[..., :10, :12], (5, 3)),
    "adaptive-uneven": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "lp-like": lambda x: F.avg_pool2d(x * x, 3, 3).sqrt(),
}
for _name, _f in POOLS.items():
    case(f"pool-{_name}", _f, IMAGE)
    layer(
        f"pool-after-conv-{_name}",
        lambda x, w, f=_f: f(F.conv2d(x, w, padding=1)),
        (IMAGE,),
        (rand(6, 6, 3, 3, seed=1),),
    )
case("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), rand(2, 4, 13))
case("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1), rand(2, 4, 13))
case("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 3), rand(2, 4, 12))
case("max_pool3d", lambda x: F.max_pool3d(x, 3, 2, 1), rand(2, 4, 7, 8, 9))
case("avg_pool3d", lambda x: F.avg_pool3d(x, 3, 2, 1, count_include_pad=False), rand(2, 4, 7, 8, 9))
case("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (1, 1, 1)), rand(2, 4, 7, 8, 9))
for _mode, _options in (("nearest", {}), ("bilinear", {"align_corners": False}), ("bilinear", {"align_corners": True})):
    _tag = f"{_mode}{'-corners' if _options.get('align_corners') else ''}"
    case(f"resize-{_tag}-double", lambda x, m=_mode, o=_options: F.interpolate(x, scale_factor=2, mode=m, **o), IMAGE)
    case(f"resize-{_tag}-odd", lambda x, m=_mode, o=_options: F.interpolate(x, size=(17, 9), mode=m, **o), IMAGE)
    layer(
        f"resize-{_tag}-between-convs",
        lambda x, w, m=_mode, o=_options: F.conv2d(F.interpolate(F.conv2d(x, w), scale_factor=2, mode=m, **o), w),
        (IMAGE,),
        (rand(6, 6, 1, 1, seed=1),),
    )

# ---------------------------------------------------------------------- attention

Q, K, V = rand(2, 3, 9, 8), rand(2, 3, 7, 8, seed=1), rand(2, 3, 7, 8, seed=2)
ATTENTION = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "additive": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[:1, :1, :, :7]),
    "boolean": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[:, :, :, :7] > -0.5),
    "boolean-row": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[:, :1, :1, :7] > -1.0),
    "mask-2d": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q[0, 0, :, :7]),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "causal-rectangular": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "three-dims": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "narrow-values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :5]),
    "large-logits": lambda q, k, v: F.scaled_dot_product_attention(40 * q, k, v),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q.repeat(1, 2, 1, 1), k, v, enable_gqa=True),
    "written-out": lambda q, k, v: (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v,
    "five-dims": lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]),
    "windows": lambda q, k, v: F.scaled_dot_product_attention(*(torch.stack([t, t.flip(0)], 1) for t in (q, k, v))),
    "windows-masked": lambda q, k, v: F.scaled_dot_product_attention(
        *(torch.stack([t, t.flip(0)], 1) for t in (q, k, v)), torch.stack([q, -q], 1)[:, :, :1, :, :7]
    ),
    "windows-of-one-mask": lambda q, k, v: F.scaled_dot_product_attention(
        *(torch.stack([t, t.flip(0)], 1) for t in (q, k, v)), torch.stack([q, -q], 1)[:1, :, :, :, :7] > 0
    ),
    "two-dims": lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]),
}
for _name, _f in ATTENTION.items():
    case(f"attention-{_name}", _f, Q, K, V)
case(
    "attention-tiles",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    rand(1, 2, 197, 64),
    rand(1, 2, 197, 64, seed=1),
    rand(1, 2, 197, 64, seed=2),
)
case(
    "attention-long",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    rand(1, 1, 130, 32),
    rand(1, 1, 1030, 32, seed=1),
    rand(1, 1, 1030, 32, seed=2),
)

# ---------------------------------------------------------------------- writes at places

GRID, ROWS, PLACES = rand(4, 6, 8), rand(4, 3, 8, seed=1), torch.tensor([5, 0, -2])
AGAIN, ELSEWHERE = torch.tensor([5, 0, 5]), torch.tensor([3, 1, 3])
FEW, MANY = ints(3, 2, 5, high=4), ints(4, 3, 8, high=6)
PUT = torch.ops.aten.index_put
HOLES = torch.where(GRID > 1.5, torch.nan, GRID)
for _name, _f, _inputs in (
    ("cache", lambda x, i, v: x.index_copy(1, i, v), (GRID, PLACES % 6, ROWS)),
    ("setitem", lambda x, i, v: _written(x, i, v), (GRID, PLACES, ROWS)),
    ("index-add", lambda x, i, v: x.index_add(1, i, v), (GRID, AGAIN, ROWS)),
    ("last-wins", lambda x, i, v: PUT(x, [None, i], v[:, -1:]), (GRID, AGAIN, ROWS)),
    ("two-indices", lambda x, i, j, v: PUT(x, [i, j], v), (GRID, ELSEWHERE[:2], PLACES[:2], rand(2, 8))),
    ("two-that-add", lambda x, i, j, v: PUT(x, [i, j], v, True), (GRID, ELSEWHERE, AGAIN, rand(3, 8))),
    ("apart", lambda x, i, j, v: PUT(x, [i, None, j], v), (GRID, ELSEWHERE[:2], PLACES[:2], rand(2, 6))),
    ("broadcast", lambda x, i, j, v: PUT(x, [i[:2, None], j], v), (GRID, ELSEWHERE, AGAIN[:2], rand(2, 2, 8))),
    ("mask-number", lambda x: PUT(x, [x > 0], torch.tensor(2.0)), (GRID,)),
    ("mask-rows", lambda x, v: PUT(x, [x[..., 0] > 0], v), (GRID, rand(8))),
    ("mask-values", lambda x, v: PUT(x, [x > 0], v), (GRID, rand(int((GRID > 0).sum())))),
    ("masked-scatter", lambda x, v: x.masked_scatter(x[:, :1] > 0, v), (GRID, rand(4 * 6 * 8))),
    ("integers", lambda x, i, v: PUT(x, [i], v), (ints(6), ELSEWHERE[:2], ints(2))),
    ("scatter-add", lambda x, i, v: x.scatter_add(1, i, v), (GRID, MANY, ROWS)),
    ("scatter-add-half", lambda x, i, v: x.scatter_add(1, i, v), (GRID.half(), MANY, ROWS.half())),
    ("scatter-mean-integers", lambda x, i, v: x.scatter_reduce(1, i, v, "mean"), (ints(4, 6, 8, low=-9), MANY, ints(4, 3, 8, low=-9))),
    *((f"scatter-{how}-nan", lambda x, i, v, h=how: x.scatter_reduce(1, i, v, h), (HOLES, MANY, HOLES[:, :3])) for how in ("amax", "amin")),
    *(
        (f"scatter-{how}-{own}", lambda x, i, v, h=how, o=own: x.scatter_reduce(0, i, v, h, include_self=o), (GRID, FEW, ROWS))
        for how in ("sum", "prod", "mean", "amax", "amin")
        for own in (True, False)
    ),
):  # fmt: skip
    case(f"write-{_name}", _f, *_inputs)


def _written(x: Tensor, i: Tensor, v: Tensor) -> Tensor:
    x = x.clone()
    x[:, i] = v
    x[:, i, 0] += 1
    return x


#: What does not lower yet, with the reason. An entry that starts to work must be removed: the test fails then, too.
UNSUPPORTED: dict[str, str] = {}


class Wrap(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def lowered_outputs(function: Callable, inputs: tuple) -> tuple[list, list]:
    """(eager outputs, compiled outputs) of one case."""
    module = function if isinstance(function, nn.Module) else Wrap(function)
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(module(*inputs))
    program = capture(module, inputs)
    program = PassManager([*pipelines.exact, *pipelines.specialize], "off").run(program).rounded()
    return expected, TVMBackend().lower(program, "cpu").run(inputs)


@pytest.mark.parametrize("name", sorted(CASES))
def test_operator(name: str) -> None:
    """The compiled operator gives what eager gives, within the tolerance of its dtype."""
    function, inputs = CASES[name]
    expected, found = lowered_outputs(function, inputs)
    tolerance = max(LOWERING_TOLERANCE.get(e.dtype, 0.0) for e in expected) * 0.1
    divergence = compare(expected, found)
    assert [e.dtype for e in expected] == [f.dtype for f in found]
    assert not divergence.exceeds(tolerance), divergence


def test_the_sweep_is_large() -> None:
    assert len(CASES) >= 300
