"""Thresher: a compiler for pruned and sparse PyTorch models. It takes a model as it is and makes the saving real.

>>> compiled = thresher.compile(model, (x,))
>>> y = compiled(x)
>>> compiled.save("model.thresher"); thresher.load("model.thresher")(x)

These are the names that a user needs; those that a pass is written with are in :mod:`thresher.authoring`. Each is imported when it is first
asked for: ``import thresher`` itself loads neither torch nor TVM.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thresher.approximation.budget import Budget
    from thresher.artifact.bundle import Bundle
    from thresher.artifact.compiled import Compiled
    from thresher.artifact.reader import load
    from thresher.driver.compile import compile, lower, rewrite
    from thresher.errors import ThresherError
    from thresher.frontend.capture import capture
    from thresher.frontend.onnx.reader import read_onnx
    from thresher.tuning.options import Tune

__all__ = [
    "Budget",
    "Bundle",
    "Compiled",
    "ThresherError",
    "Tune",
    "capture",
    "compile",
    "load",
    "lower",
    "read_onnx",
    "rewrite",
]

_HAS_TORCH = importlib.util.find_spec("torch") is not None

#: The module of each public name. Without torch, artifacts run on NumPy arrays.
_MODULES = {
    "Budget": "thresher.approximation.budget",
    "Bundle": "thresher.artifact.bundle",
    "Compiled": "thresher.artifact.compiled",
    "ThresherError": "thresher.errors",
    "Tune": "thresher.tuning.options",
    "capture": "thresher.frontend.capture",
    "compile": "thresher.driver.compile",
    "load": "thresher.artifact.reader" if _HAS_TORCH else "thresher.artifact.numpy_reader",
    "lower": "thresher.driver.compile",
    "read_onnx": "thresher.frontend.onnx.reader",
    "rewrite": "thresher.driver.compile",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562). Raises :class:`ImportError` where it needs torch and there is none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"thresher.{name} needs torch: pip install torch. Without it, thresher.load runs artifacts"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
