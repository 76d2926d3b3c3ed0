"""ONNX operators that compute each element by itself, in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.frontend.onnx.rules import RULES, Node, folded, plain, rule


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


RULES |= {
    "Relu": plain(torch.relu), "Sigmoid": plain(torch.sigmoid), "Tanh": plain(torch.tanh), "Exp": plain(torch.exp),
    "Log": plain(torch.log), "Sqrt": plain(torch.sqrt), "Reciprocal": plain(torch.reciprocal), "Neg": plain(torch.neg),
    "Abs": plain(torch.abs), "Floor": plain(torch.floor), "Ceil": plain(torch.ceil), "Round": plain(torch.round),
    "Sign": plain(torch.sign), "Erf": plain(torch.erf), "Sin": plain(torch.sin), "Cos": plain(torch.cos),
    "Not": plain(torch.logical_not),
    "Softplus": plain(F.softplus), "HardSwish": plain(F.hardswish), "Mish": plain(F.mish), "IsNaN": plain(torch.isnan),
    "Add": plain(torch.add), "Sub": plain(torch.sub), "Mul": plain(torch.mul), "Div": plain(_divided),
    "Equal": plain(torch.eq), "Greater": plain(torch.gt), "GreaterOrEqual": plain(torch.ge), "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le), "And": plain(torch.logical_and), "Or": plain(torch.logical_or), "Where": plain(torch.where),
    "Max": folded(torch.maximum), "Min": folded(torch.minimum), "Sum": folded(torch.add),
    "LeakyRelu": lambda n, x: F.leaky_relu(x, n.get("alpha", 0.01)), "Elu": lambda n, x: F.elu(x, n.get("alpha", 1.0)),
    "Selu": lambda n, x: F.selu(x), "ThresholdedRelu": lambda n, x: F.threshold(x, n.get("alpha", 1.0), 0.0),
    "Celu": lambda n, x: F.celu(x, n.get("alpha", 1.0)), "Gelu": lambda n, x: F.gelu(x, approximate=n.get("approximate", "none")),
    "HardSigmoid": lambda n, x: torch.clamp(x * n.get("alpha", 0.2) + n.get("beta", 0.5), 0.0, 1.0),
    "Pow": lambda n, x, y: n.tensor(x) ** (y.item() if isinstance(y, np.ndarray) and y.size == 1 else n.tensor(y)),
    "Dropout": lambda n, x, *_: [x, torch.ones_like(x, dtype=torch.bool)],
}  # fmt: skip


@rule("Cast")
def cast(node: Node, x: Tensor) -> Tensor:
    """Return x in the type ``to``."""
    from onnx import helper

    return x.to(torch.from_numpy(np.zeros((), helper.tensor_dtype_to_np_dtype(node.get("to")))).dtype)


@rule("PRelu")
def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    """Return x, times ``slope`` where it is negative."""
    return torch.where(x < 0, x * node.tensor(slope), x)


@rule("Clip")
def clip(node: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Return x within its bounds: attributes before opset 11, inputs from there on."""
    bounds = [node.get(k) if v is None else node.static(v, k).item() for k, v in (("min", low), ("max", high))]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)
