"""The search for an operator that is lowered wrongly: each one is lowered alone, on the values that it has in the whole program."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from thresher.backends.base import Backend
from thresher.errors import BackendError
from thresher.ir.nodes import is_tensor, module_path, source_line
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.runtime.comparison import check_outputs


def first_wrong_operator(program: Program, backend: Backend, target: str) -> str:
    """Return a sentence that names the first operator of ``program`` whose lowering alone differs from torch, or an empty string.

    The program runs on its probe; a call differs if its error exceeds the tolerance of its dtype.
    """
    values: dict[fx.Node, Any] = {}
    program.run(*program.probe, watch=lambda node, value: values.__setitem__(node, value))
    for node in program.calls():
        if not is_tensor(node):
            continue
        alone = extract_subprogram(program, [node], values, {node})
        try:
            outputs = backend.lower(alone, target).run([v for v in alone.probe if isinstance(v, Tensor)])
        except BackendError as error:
            return f"{node.name} cannot be lowered alone: {error}"
        check = check_outputs(node.name, [values[node]], outputs)
        if not check.passed:
            return f"{node.name} ({node.target}, module {module_path(node)}), error {check.error:.2e} {source_line(node)}".rstrip()
    return ""
