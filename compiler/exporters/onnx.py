"""Write a folded model as an ``.onnx`` file, for users of other runtimes.

    small = thresher.rewrite(model, args)
    write_onnx(small, args, "small.onnx")

Operators of ours are written out by their references. What was written is run by onnxruntime and compared before it appears under its name.
Needs ``pip install onnx onnxscript onnxruntime``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from thresher.atomic_files import replacing
from thresher.errors import BackendError, ValidationError
from thresher.ir.folded_module import FoldedModule
from thresher.ops.define import REFERENCES
from thresher.verification.compare import LOWERING_TOLERANCE, compare


def write_onnx(model: nn.Module, args: Sequence[Any], path: str | os.PathLike, opset: int | None = None) -> Path:
    """Write ``model`` (a result of :func:`thresher.rewrite`) for inputs like ``args``, and return the path.

    ``opset``: a version of ONNX's operators; default: the one that torch.onnx writes best.

    Raises :class:`BackendError` where ONNX has no form for an operator, :class:`ValidationError` where onnxruntime computes something else.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx asks for it)
    except ImportError as error:
        raise BackendError(f"writing ONNX needs another package: pip install 'thresher[onnx]' ({error})") from error
    path, args = Path(path), tuple(args)
    if isinstance(model, FoldedModule) and model.program.writes:
        program = model.program
        names = [*program.state, *(program.placeholders[i].name for i in program.writes)]
        raise BackendError(f"this model writes into {names[0]!r}, and a file of ONNX has no state")
    with torch.no_grad():
        reference = pytree.tree_leaves(model(*args))
        exported = torch.export.export(model, args, strict=False).run_decompositions(_written_out())
    try:
        onnx_program = torch.onnx.export(exported, (), opset_version=opset, dynamo=True, verbose=False, optimize=True)
    except Exception as error:
        raise BackendError(f"this model cannot be written as ONNX: {str(error)[:800]}") from error
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        file = Path(folder) / "model.onnx"
        onnx_program.save(str(file))
        onnx.checker.check_model(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs = [v for v in pytree.tree_leaves(args) if isinstance(v, Tensor)]
        outputs = session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), inputs, strict=True)})
        tensors = [w for w in reference if isinstance(w, Tensor)]
        difference = compare(tensors, [torch.from_numpy(o) for o in outputs])
        tolerance = max((LOWERING_TOLERANCE.get(w.dtype, 0.0) for w in tensors), default=0.0)
        if difference.exceeds(tolerance):
            raise ValidationError(
                f"onnxruntime computes something else: error {difference.relative:.2e} > {tolerance:.0e} {difference.reason}"
            )
        with replacing(path) as temporary:
            temporary.write_bytes(file.read_bytes())
    return path


def _written_out() -> dict[Any, Any]:
    """Return the table that decomposes operators of ours into their references; everything else stays for torch.onnx."""
    table = {}
    for name, reference in REFERENCES.items():
        namespace, _, operator = name.partition("::")
        table[getattr(getattr(torch.ops, namespace), operator).default] = reference
    return table
