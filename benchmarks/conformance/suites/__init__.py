"""The suites, by name, in the order of the page."""

from __future__ import annotations

from ..sample import Suite
from . import families, onnx_models, onnx_nodes, operators, torch_modules

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        operators.FLOAT32,
        operators.OTHERS,
        torch_modules.MODULES,
        onnx_nodes.NODES,
        onnx_models.MODELS,
        families.TORCHVISION,
        families.TIMM,
        families.TRANSFORMERS,
    )
}
