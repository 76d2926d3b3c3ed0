"""Thresher: a compiler for pruned and sparse PyTorch models. It takes a model as it is and makes the saving real.

>>> compiled = thresher.compile(model, (x,))
>>> y = compiled(x)
>>> compiled.save("model.thresher"); thresher.load("model.thresher")(x)
"""

import importlib.util
from typing import TYPE_CHECKING

if not TYPE_CHECKING and importlib.util.find_spec("torch") is None:  # then compiled models run, and nothing is compiled
    from thresher.runtime import load
else:
    import thresher.ops  # noqa: F401  (registers the operators)
    from thresher.artifact import load
    from thresher.budget import Budget
    from thresher.bundle import Bundle
    from thresher.capture import capture
    from thresher.certificate import Certificate
    from thresher.compiled import Compiled
    from thresher.driver import compile, rewrite
    from thresher.errors import (
        ArtifactError,
        BackendError,
        CaptureError,
        InputError,
        PassError,
        ProgramError,
        RecordsError,
        ThresherError,
        ValidationError,
    )
    from thresher.masks import apply_masks
    from thresher.onnx_reader import read_onnx
    from thresher.onnx_writer import write_onnx
    from thresher.pass_manager import Context, Note, Pass, PassManager, PassResult, register_pass
    from thresher.passes import pipelines
    from thresher.program import Program
    from thresher.records import Record, Records
    from thresher.report import Report
    from thresher.selection import BoundedPass, Candidate
    from thresher.tuning import Remote, Tune

__all__ = [
    "ArtifactError",
    "BackendError",
    "BoundedPass",
    "Budget",
    "Bundle",
    "Candidate",
    "CaptureError",
    "Certificate",
    "Compiled",
    "Context",
    "InputError",
    "Note",
    "Pass",
    "PassError",
    "PassManager",
    "PassResult",
    "Program",
    "ProgramError",
    "Record",
    "Records",
    "RecordsError",
    "Remote",
    "Report",
    "ThresherError",
    "Tune",
    "ValidationError",
    "apply_masks",
    "capture",
    "compile",
    "load",
    "pipelines",
    "read_onnx",
    "register_pass",
    "rewrite",
    "write_onnx",
]
