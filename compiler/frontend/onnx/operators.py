"""All ONNX operators that have a rule: importing this module fills RULES, a family of operators from each file.

The specification: https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

from thresher.frontend.onnx import (  # noqa: F401
    arithmetic,
    casts,
    control,
    convolutions,
    elementwise,
    indexing,
    matrices,
    ml,
    norms,
    padding,
    pools,
    quantized,
    recurrent,
    reductions,
    resize,
    sequences,
    shapes,
    signals,
    vision,
)
from thresher.frontend.onnx.rules import RULES, find_rule

__all__ = ["RULES", "find_rule"]
