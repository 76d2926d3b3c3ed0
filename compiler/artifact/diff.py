"""The differences of two artifacts: their inputs, builds, sizes and graphs, and their results on the same inputs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from thresher.artifact.compiled import Compiled
from thresher.errors import ThresherError
from thresher.runtime.comparison import compare
from thresher.runtime.tensor_spec import TensorSpec


def difference(a: Compiled, b: Compiled) -> Iterator[str]:
    """Yield one line for each difference, from the outside in; none where the two are the same."""
    inputs = [_inputs(a), _inputs(b)]
    if inputs[0] != inputs[1]:
        yield f"takes {inputs[0]} | {inputs[1]}"
    for name in ("target", "backend"):
        one, other = getattr(a.report, name), getattr(b.report, name)
        if one != other:
            yield f"{name} {one} | {other}"
    for name, unit, scale in (("parameters", "M", 1e6), ("flops", "GFLOP", 1e9), ("bytes", "MB", 1e6)):
        one, other = getattr(a.report.after, name), getattr(b.report.after, name)
        if one != other:
            yield f"{name} {one / scale:.4g} | {other / scale:.4g} {unit} ({100 * (other - one) / max(one, 1):+.1f} %)"
    passes = [{r.name: (r.status, len(r.rewrites)) for r in c.report.passes} for c in (a, b)]
    for name in dict.fromkeys([*passes[0], *passes[1]]):
        one, other = (p.get(name) for p in passes)
        if one != other:
            yield f"pass {name}: {_outcome(one)} | {_outcome(other)}"
    yield from _graphs(a.text, b.text)
    if inputs[0] == inputs[1]:
        yield from _outputs(a, b)


def _inputs(compiled: Compiled) -> list[str]:
    inputs = compiled.signature.inputs
    return [
        f"{s.name}: {s.dtype} {list(s.shape)}" if isinstance(s, TensorSpec) else f"{s.name} = {s.value!r}"
        for s in inputs
    ]


def _outcome(record: Any) -> str:
    return "not run" if record is None else f"{record[0]}, {record[1]} rewrites"


def _graphs(a: str, b: str) -> Iterator[str]:
    """Yield the lines of the graphs that differ, without their origins in the user's code."""
    one, other = ([re.sub(r"  # .*$", "", line) for line in text.splitlines()] for text in (a, b))
    for line in difflib.unified_diff(one, other, lineterm="", n=0):
        if not line.startswith(("---", "+++", "@@")):
            yield f"graph {line}"


def _outputs(a: Compiled, b: Compiled) -> Iterator[str]:
    """Yield the outputs that differ on the inputs of the first one's reference run."""
    try:
        one, other = (
            c.signature.with_literals(c.executable.run(c.signature.check(a.reference_run.inputs))) for c in (a, b)
        )
    except ThresherError as error:
        yield f"outputs: not compared ({error})"
        return
    for i, (x, y) in enumerate(zip(one, other)):
        divergence = compare([x], [y])
        if divergence.reason or divergence.relative > 0:
            kind = "tensor" if isinstance(x, Tensor) else "literal"
            yield f"output {i} ({kind}): {divergence.reason or f'relative difference {divergence.relative:.1e}'}"
