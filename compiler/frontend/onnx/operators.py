"""What the operators of ONNX compute, in torch: one line each where torch has the same, a function where opsets or conventions differ.

A rule is ``f(node, *inputs)``. Inputs are tensors, NumPy arrays where they depend on no input of the model (sizes, axes, weights), or None.
The specification: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Unsupported(Exception):
    """A use of an operator that is not known here, in words."""


@dataclass(frozen=True)
class Node:
    """The attributes of a node, and how an input becomes a tensor."""

    name: str
    attributes: dict[str, Any]
    outputs: int
    opset: int
    tensor: Callable[[Any], Any]

    @staticmethod
    def of(proto: Any, opset: int, tensor: Callable[[Any], Any]) -> Node:
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        text = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
        return Node(proto.name, text, len(proto.output), opset, tensor)

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def static(self, value: Any, name: str) -> np.ndarray:
        if isinstance(value, Tensor):
            raise Unsupported(f"its {name} depends on values, not on shapes")
        return np.asarray(value)

    def numbers(self, name: str, value: Any = None) -> list[int] | None:
        """Integers that were an attribute in old opsets and are an input in new ones."""
        if value is not None:
            return [int(v) for v in self.static(value, name).reshape(-1)]
        found = self.get(name)
        return None if found is None else [int(found)] if isinstance(found, int) else [int(v) for v in found]


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _plain(function: Callable[..., Any]) -> Rule:
    """All inputs as tensors, no attributes."""
    return lambda node, *values: function(*(node.tensor(v) for v in values))


def _folded(function: Callable[[Any, Any], Any]) -> Rule:
    """Of any number of inputs."""

    def run(node: Node, *values: Any) -> Any:
        result = node.tensor(values[0])
        for value in values[1:]:
            result = function(result, node.tensor(value))
        return result

    return run


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


RULES |= {
    "Relu": _plain(torch.relu), "Sigmoid": _plain(torch.sigmoid), "Tanh": _plain(torch.tanh), "Exp": _plain(torch.exp),
    "Log": _plain(torch.log), "Sqrt": _plain(torch.sqrt), "Reciprocal": _plain(torch.reciprocal), "Neg": _plain(torch.neg),
    "Abs": _plain(torch.abs), "Floor": _plain(torch.floor), "Ceil": _plain(torch.ceil), "Round": _plain(torch.round),
    "Sign": _plain(torch.sign), "Erf": _plain(torch.erf), "Sin": _plain(torch.sin), "Cos": _plain(torch.cos),
    "Not": _plain(torch.logical_not),
    "Softplus": _plain(F.softplus), "HardSwish": _plain(F.hardswish), "Mish": _plain(F.mish), "IsNaN": _plain(torch.isnan),
    "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul), "Div": _plain(_divided), "MatMul": _plain(torch.matmul),
    "Equal": _plain(torch.eq), "Greater": _plain(torch.gt), "GreaterOrEqual": _plain(torch.ge), "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le), "And": _plain(torch.logical_and), "Or": _plain(torch.logical_or), "Where": _plain(torch.where),
    "Max": _folded(torch.maximum), "Min": _folded(torch.minimum), "Sum": _folded(torch.add),
    "GlobalAveragePool": lambda n, x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda n, x: x.amax(tuple(range(2, x.dim())), keepdim=True),
    "LeakyRelu": lambda n, x: F.leaky_relu(x, n.get("alpha", 0.01)), "Elu": lambda n, x: F.elu(x, n.get("alpha", 1.0)),
    "Selu": lambda n, x: F.selu(x), "ThresholdedRelu": lambda n, x: F.threshold(x, n.get("alpha", 1.0), 0.0),
    "Celu": lambda n, x: F.celu(x, n.get("alpha", 1.0)), "Gelu": lambda n, x: F.gelu(x, approximate=n.get("approximate", "none")),
    "HardSigmoid": lambda n, x: torch.clamp(x * n.get("alpha", 0.2) + n.get("beta", 0.5), 0.0, 1.0),
    "Pow": lambda n, x, y: n.tensor(x) ** (y.item() if isinstance(y, np.ndarray) and y.size == 1 else n.tensor(y)),
    "Dropout": lambda n, x, *_: [x, torch.ones_like(x, dtype=torch.bool)],
    "Shape": lambda n, x: np.array(x.shape[n.get("start", 0):n.get("end")]),
    "Size": lambda n, x: np.array(math.prod(x.shape)), "Transpose": lambda n, x: x.permute(n.get("perm") or list(range(x.dim()))[::-1]),
    "Concat": lambda n, *v: torch.cat([n.tensor(x) for x in v], n.get("axis")), "Flatten": lambda n, x: _rows(x, n.get("axis", 1)),
    "LogSoftmax": lambda n, x: _along(n, x, torch.log_softmax), "Softmax": lambda n, x: _along(n, x, torch.softmax),
    "GatherElements": lambda n, x, i: torch.gather(n.tensor(x), n.get("axis", 0), n.tensor(i).long()),
    "Expand": lambda n, x, s: _expanded(n.tensor(x), n.numbers("shape", s)), "Tile": lambda n, x, r: x.repeat(n.numbers("repeats", r)),
    "CumSum": lambda n, x, a: torch.cumsum(x, int(n.static(a, "axis"))),
    "Einsum": lambda n, *v: torch.einsum(n.get("equation"), *map(n.tensor, v)),
    "Trilu": lambda n, x, k=None: (torch.triu if n.get("upper", 1) else torch.tril)(x, int(n.static(0 if k is None else k, "k"))),
}  # fmt: skip


@rule("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    from onnx import helper

    return x.to(torch.from_numpy(np.zeros((), helper.tensor_dtype_to_np_dtype(node.get("to")))).dtype)


# ---------------------------------------------------------------------- convolutions, pools, norms


def _padded(
    node: Node, x: Tensor, window: Sequence[int], stride: Sequence[int], dilation: Sequence[int], fill: float
) -> tuple[Tensor, list[int]]:
    """x with what torch cannot pad by itself (more on one side), and what it can."""
    rank, auto = len(window), node.get("auto_pad", "NOTSET")
    pads = list(node.get("pads") or [0] * 2 * rank)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * rank
        for d in range(rank):
            size = int(x.shape[2 + d])
            total = max(0, (-(-size // stride[d]) - 1) * stride[d] + dilation[d] * (window[d] - 1) + 1 - size)
            less, more = total // 2, total - total // 2
            pads[d], pads[rank + d] = (less, more) if auto == "SAME_UPPER" else (more, less)
    if pads[:rank] == pads[rank:]:
        return x, pads[:rank]
    around = [p for d in reversed(range(rank)) for p in (pads[d], pads[rank + d])]
    return F.pad(x, around, value=fill), [0] * rank


@rule("Conv")
def conv(node: Node, x: Tensor, w: Any, b: Any = None) -> Tensor:
    w = node.tensor(w)
    rank = w.dim() - 2
    stride, dilation = (node.get(k) or [1] * rank for k in ("strides", "dilations"))
    x, padding = _padded(node, x, list(w.shape[2:]), stride, dilation, 0.0)
    call = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return call(x, w, node.tensor(b), stride, padding, dilation, node.get("group", 1))


@rule("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, w: Any, b: Any = None) -> Tensor:
    w = node.tensor(w)
    rank = w.dim() - 2
    pads = node.get("pads") or [0] * 2 * rank
    if (
        node.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or node.get("output_shape")
        or pads[:rank] != pads[rank:]
    ):
        raise Unsupported("padding that is not the same on both sides")
    stride, dilation = (node.get(k) or [1] * rank for k in ("strides", "dilations"))
    call = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    return call(
        x, w, node.tensor(b), stride, pads[:rank], node.get("output_padding") or 0, node.get("group", 1), dilation
    )


@rule("MaxPool")
def max_pool(node: Node, x: Tensor) -> Tensor:
    window = node.get("kernel_shape")
    stride, dilation = (node.get(k) or [1] * len(window) for k in ("strides", "dilations"))
    if node.outputs > 1:
        raise Unsupported("the places of the largest are asked for")
    x, padding = _padded(node, x, window, stride, dilation, -math.inf)
    call = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1]
    return call(x, window, stride, padding, dilation, bool(node.get("ceil_mode", 0)))


@rule("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    window, counts = node.get("kernel_shape"), bool(node.get("count_include_pad", 0))
    stride = node.get("strides") or [1] * len(window)
    if any(d != 1 for d in node.get("dilations") or ()):
        raise Unsupported("dilations")
    before = x.shape
    x, padding = _padded(node, x, window, stride, [1] * len(window), 0.0)
    if x.shape != before and not counts:
        raise Unsupported("padding that is not the same on both sides and is not counted")
    call = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1]
    return call(x, window, stride, padding, bool(node.get("ceil_mode", 0)), counts)


@rule("BatchNormalization")
def batch_norm(node: Node, x: Tensor, *parameters: Any) -> Tensor:
    scale, bias, mean, variance = map(node.tensor, parameters)
    if node.get("training_mode", 0):
        raise Unsupported("training mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5))


@rule("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Any, bias: Any) -> Tensor:
    return F.instance_norm(x, weight=node.tensor(scale), bias=node.tensor(bias), eps=node.get("epsilon", 1e-5))


@rule("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Any, bias: Any = None) -> Tensor:
    shape = x.shape[node.get("axis", -1) :]
    return F.layer_norm(x, shape, node.tensor(scale).expand(shape), node.tensor(bias), node.get("epsilon", 1e-5))


@rule("Gemm")
def gemm(node: Node, a: Any, b: Any, c: Any = None) -> Tensor:
    a, b, c = (node.tensor(v) for v in (a, b, c))
    a = a.mT if node.get("transA", 0) else a
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    if node.get("transB", 0) and alpha == 1.0 and (c is None or (beta == 1.0 and c.dim() == 1)):
        return F.linear(a, b, c)
    product = alpha * (a @ (b.mT if node.get("transB", 0) else b))
    return product if c is None else product + beta * c


# ---------------------------------------------------------------------- shapes and places


@rule("Reshape")
def reshape(node: Node, x: Any, shape: Any) -> Tensor:
    x, sizes = node.tensor(x), node.numbers("shape", shape)
    assert sizes is not None
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


def _rows(x: Tensor, axis: int) -> Tensor:
    axis = axis % x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _expanded(x: Tensor, shape: list[int]) -> Tensor:
    """Both ways: where the shape says 1, x stays as wide as it is."""
    return x.expand(torch.broadcast_shapes(x.shape, shape))


@rule("Squeeze")
def squeeze(node: Node, x: Tensor, axes: Any = None) -> Tensor:
    dims = node.numbers("axes", axes)
    return x.squeeze() if dims is None else x.squeeze(tuple(dims))


@rule("Unsqueeze")
def unsqueeze(node: Node, x: Any, axes: Any = None) -> Tensor:
    x, dims = node.tensor(x), node.numbers("axes", axes) or []
    rank = x.dim() + len(dims)
    for d in sorted(d % rank for d in dims):
        x = x.unsqueeze(d)
    return x


@rule("Slice")
def slice_(node: Node, x: Any, *given: Any) -> Tensor:
    x = node.tensor(x)
    values = [*given, *[None] * 4]
    starts, ends = (node.numbers(k, v) or [] for k, v in zip(("starts", "ends"), values))
    axes = node.numbers("axes", values[2]) or list(range(len(starts)))
    for start, end, axis, step in zip(starts, ends, axes, node.numbers("steps", values[3]) or [1] * len(starts)):
        if step > 0:
            axis_slice: list[Any] = [slice(None)] * x.dim()
            axis_slice[axis] = slice(start, end, step)
            x = x[tuple(axis_slice)]
        else:
            places = list(range(int(x.shape[axis])))[start : None if end < -int(x.shape[axis]) else end : step]
            x = x.index_select(axis, torch.tensor(places))
    return x


@rule("Split")
def split(node: Node, x: Tensor, sizes: Any = None) -> Sequence[Tensor]:
    axis = node.get("axis", 0)
    parts = node.numbers("split", sizes)
    if parts is None:
        width = -(-int(x.shape[axis]) // node.outputs)
        return x.split(width, axis)
    return x.split(parts, axis)


@rule("Gather")
def gather(node: Node, x: Any, places: Any) -> Tensor:
    x, axis = node.tensor(x), node.get("axis", 0)
    if isinstance(places, np.ndarray) and places.ndim == 0:
        return x.select(axis, int(places))
    index = node.tensor(places).long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    axis = axis % x.dim()
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return F.embedding(index, x)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@rule("ScatterElements")
def scatter_elements(node: Node, x: Any, places: Any, updates: Any) -> Tensor:
    if node.get("reduction", "none") != "none":
        raise Unsupported(f"the reduction {node.get('reduction')}")
    x, index, axis = node.tensor(x), node.tensor(places).long(), node.get("axis", 0)
    return x.scatter(axis, torch.where(index < 0, index + x.shape[axis], index), node.tensor(updates))


@rule("Pad")
def pad(node: Node, x: Any, pads: Any = None, fill: Any = None, axes: Any = None) -> Tensor:
    x, amounts = node.tensor(x), node.numbers("pads", pads) or []
    over = node.numbers("axes", axes) or list(range(x.dim()))
    value = node.get("value", 0.0) if fill is None else float(node.static(fill, "value"))
    around = [0] * (2 * x.dim())
    for i, axis in enumerate(over):
        place = 2 * (x.dim() - 1 - axis % x.dim())
        around[place : place + 2] = amounts[i], amounts[i + len(over)]
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        node.get("mode", "constant")
    ]
    if mode == "constant":
        return F.pad(x, around, value=value)
    while len(around) > 2 and around[-2:] == [0, 0]:
        around = around[:-2]
    lead = x.dim() - len(around) // 2  # torch pads the last ones of two to five dimensions
    flat = x.reshape(1, -1, *x.shape[lead:])
    padded = F.pad(flat, around, mode=mode)
    return padded.reshape(*x.shape[:lead], *padded.shape[2:])


@rule("ConstantOfShape")
def constant_of_shape(node: Node, shape: Any) -> Tensor:
    raise Unsupported("its shape depends on values")


@rule("Range", "Mod")
def on_values(node: Node, *values: Any) -> Tensor:
    raise Unsupported("its numbers depend on values, not on shapes")


@rule("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    size = node.get("blocksize")
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, size)
    n, c, h, w = x.shape
    y = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return y.reshape(n, c // size**2, h * size, w * size)


@rule("Resize")
def resize(node: Node, x: Tensor, region: Any = None, scales: Any = None, sizes: Any = None) -> Tensor:
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
    """Each place of the result from the nearest one: torch's own where that says the same, else picked by number."""
    rounding = node.get("nearest_mode", "round_prefer_floor") if node.opset >= 11 else "floor"
    picked = []
    for new, old in zip(size, x.shape[2:]):
        place, scale = np.arange(new), int(old) / new
        if where == "asymmetric":
            at = place * scale
        elif where in ("half_pixel", "pytorch_half_pixel"):
            at = (place + 0.5) * scale - 0.5
        elif where == "align_corners":
            at = place * ((int(old) - 1) / max(new - 1, 1))
        else:
            raise Unsupported(f"nearest with {where}")
        rounded = ROUNDINGS[rounding](at)
        picked.append(np.clip(rounded, 0, int(old) - 1).astype(np.int64))
    if all((p == np.arange(len(p)) * int(old) // len(p)).all() for p, old in zip(picked, x.shape[2:])):
        return F.interpolate(x, list(size), mode="nearest")
    for d, places in enumerate(picked, 2):
        x = x.index_select(d, torch.from_numpy(places))
    return x


# ---------------------------------------------------------------------- along a dimension


def _along(node: Node, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """softmax: before opset 13 over everything from the axis on."""
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.dim()
    return function(x, -1) if axis == x.dim() - 1 else function(x.flatten(axis), -1).reshape(x.shape)


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Rule:
    def run(node: Node, x: Any, axes: Any = None) -> Tensor:
        x, dims = node.tensor(x), node.numbers("axes", axes)
        if not dims and node.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(dims or range(x.dim())), bool(node.get("keepdims", 1)))

    return run


RULES |= {
    "ReduceMean": _reduction(torch.mean), "ReduceSum": _reduction(torch.sum), "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin), "ReduceL2": _reduction(lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k)),
    "ReduceL1": _reduction(lambda x, d, k: x.abs().sum(d, k)), "ReduceSumSquare": _reduction(lambda x, d, k: x.square().sum(d, k)),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
}  # fmt: skip


@rule("ArgMax")
def argmax(node: Node, x: Tensor) -> Tensor:
    if node.get("select_last_index", 0):
        raise Unsupported("the last of equal ones")
    return x.argmax(node.get("axis", 0), bool(node.get("keepdims", 1)))


@rule("ArgMin")
def argmin(node: Node, x: Tensor) -> Tensor:
    if node.get("select_last_index", 0):
        raise Unsupported("the last of equal ones")
    return x.argmin(node.get("axis", 0), bool(node.get("keepdims", 1)))


@rule("TopK")
def topk(node: Node, x: Tensor, k: Any) -> Sequence[Tensor]:
    count = int(node.static(k, "k").reshape(-1)[0])
    return torch.topk(x, count, node.get("axis", -1), bool(node.get("largest", 1)), bool(node.get("sorted", 1)))


@rule("PRelu")
def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    return torch.where(x < 0, x * node.tensor(slope), x)


@rule("Clip")
def clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    bounds = [node.get(k) if v is None else node.static(v, k).item() for k, v in (("min", low), ("max", high))]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)
