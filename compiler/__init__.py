"""Thresher: a compiler for pruned and sparse PyTorch models. It takes a model as it is and makes the saving real.

>>> compiled = thresher.compile(model, (x,))
>>> y = compiled(x)
>>> compiled.save("model.thresher"); thresher.load("model.thresher")(x)
"""

import importlib.util
from typing import TYPE_CHECKING

if not TYPE_CHECKING and importlib.util.find_spec("torch") is None:  # then compiled models run, and nothing is compiled
    from thresher.artifact.numpy_reader import load
else:
    import thresher.ops  # noqa: F401  (registers the operators)
    from thresher.approximation.budget import Budget
    from thresher.approximation.search import Candidate
    from thresher.artifact.bundle import Bundle
    from thresher.artifact.compiled import Compiled
    from thresher.artifact.writer import load
    from thresher.driver.compile import compile, rewrite
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
    from thresher.exporters.onnx import write_onnx
    from thresher.frontend.capture import capture
    from thresher.frontend.masks import apply_masks
    from thresher.frontend.onnx.reader import read_onnx
    from thresher.ir.program import Program
    from thresher.passes import pipelines
    from thresher.report.data import Report
    from thresher.rewriting.approximate_pass import ApproximatePass
    from thresher.rewriting.contract import Context, Note, Pass, PassResult
    from thresher.rewriting.manager import PassManager
    from thresher.rewriting.registry import register_pass
    from thresher.tuning.options import Remote, Tune
    from thresher.tuning.records import Record, Records
    from thresher.verification.certificate import Certificate

__all__ = [
    "ApproximatePass",
    "ArtifactError",
    "BackendError",
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
