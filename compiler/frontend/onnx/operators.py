"""All ONNX operators that are known: importing this module fills RULES, a family of operators from each file.

The specification: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from thresher.frontend.onnx import elementwise, layers, quantized, recurrent, reductions, resize, shapes  # noqa: F401
from thresher.frontend.onnx.rules import RULES

__all__ = ["RULES"]
