"""Find the pass and its site, or the operator's lowering, that makes a result wrong, and the smallest program that shows it.

    fault = blame(model, args)            # None: nothing is wrong
    print(fault)                          # pass fold-batch-norm at getitem (layer1.0.bn1): relative error 3.1e-02
    fault.save("blame.py")                # about twenty lines that show it, and the numbers they need

The passes are applied one by one, each compared in float64 with its input; then the program is lowered and compared in its own
types. The failing program is reduced: to the first output that is wrong (by bisection), to as few calls before it as it takes, and those
one by one to inputs that have their values; then to one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, fx

from thresher.atomic_files import replacing, write_text
from thresher.backends.base import Backend, find_backend
from thresher.frontend.capture import Model, capture
from thresher.ir import parser, printer
from thresher.ir.nodes import is_tensor, module_path
from thresher.ir.program import Program
from thresher.ir.subprogram import extract_subprogram
from thresher.passes import pipelines
from thresher.rewriting.contract import Context, Pass
from thresher.rewriting.registry import make_pass
from thresher.runtime.comparison import check_outputs
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe

#: Returns a message that says what is wrong with a program; empty where nothing is.
Fails = Callable[[Program], str]


@dataclass(frozen=True)
class Blame:
    """A fault that was found.

    ``culprit`` is the pass, or the operator whose lowering is wrong, ``node`` and ``module`` are its site, and ``program`` is the smallest
    one that shows it, with its constants and inputs.
    """

    stage: Literal["pass", "lowering"]
    culprit: str
    node: str
    module: str
    error: str
    program: Program
    target: str = "cpu"

    def __str__(self) -> str:
        return f"{self.stage} {self.culprit} at {self.node} ({self.module}): {self.error}"

    def save(self, path: str | Path) -> Path:
        """Write a script that shows the fault, and beside it, with the suffix ``.safetensors``, the constants and inputs.

        The script finds a pass by its name: one that is not registered must be imported there.
        """
        path = Path(path)
        tensors = {f"constant.{k}": v for k, v in self.program.constants.items()}
        tensors |= {f"input.{i}": v for i, v in enumerate(self.program.probe) if isinstance(v, Tensor)}
        with replacing(path.with_suffix(".safetensors")) as partial:
            partial.write_bytes(save({k: v.detach().clone().contiguous() for k, v in tensors.items()}))
        check = (
            f"pass_fails({self.culprit!r}, program)"
            if self.stage == "pass"
            else f"lowering_fails(program, {self.target!r})"
        )
        name = check.partition("(")[0]
        write_text(
            path,
            f'"""{self}"""\n\nfrom pathlib import Path\n\nfrom thresher.debugging.blame import {name}, restore\n\n'
            f'PROGRAM = """\n{self.program.text()}\n"""\n\n'
            f'program = restore(PROGRAM, Path(__file__).with_suffix(".safetensors"))\nprint({check} or "nothing is wrong")\n',
        )
        return path


def blame(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    passes: pipelines.Passes = "exact",
    target: str = "cpu",
) -> Blame | None:
    """Return the first pass of ``passes`` that is not exact, or the operator whose lowering for ``target`` is wrong; None if all is well.

    Approximate passes are left out.
    """
    program = capture(model, args, kwargs or {})
    for item in map(make_pass, pipelines.resolve(passes)):
        if item.kind != "exact":
            continue
        if pass_fails(item, program):
            return _blame_pass(item, program)
        program = _apply(item, program)
    return blame_lowering(program, target)


def _apply(item: Pass, program: Program) -> Program:
    result = item.apply(program, Context())
    return result.program if result.rewrites else program


def pass_fails(item: str | Pass, program: Program) -> str:
    """Return a message that says how a pass changes what ``program`` computes in float64, or how it fails; empty if neither."""
    try:
        result = make_pass(item).apply(program, Context())
        if not result.rewrites:
            return ""
        result.program.verify()
        divergence = compare_programs(observe(program), result.program)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (
        (divergence.reason or f"relative error {divergence.relative:.1e}")
        if divergence.exceeds(EXACT_TOLERANCE)
        else ""
    )


def lowering_fails(program: Program, target: str = "cpu", backend: Backend | None = None) -> str:
    """Return a message that says how the lowered program differs from torch, or how lowering fails; empty if neither."""
    backend, rounded = backend or find_backend("tvm"), program.rounded()
    try:
        outputs = backend.lower(rounded, target).run([v for v in program.probe if isinstance(v, Tensor)])
    except Exception as error:  # of ours, or of TVM
        return f"{type(error).__name__}: {error}"
    reference = [w for w, n in zip(rounded.run(*program.probe), program.output_nodes) if is_tensor(n)]
    check = check_outputs("lowered", reference, outputs)
    return "" if check.passed else check.detail or f"relative error {check.error:.1e}"


def blame_lowering(program: Program, target: str, backend: Backend | None = None) -> Blame | None:
    """Return the fault of a pass that specialises for the backend, or of the lowering of an operator; None if all is well."""
    for item in pipelines.specialize:
        if pass_fails(item, program):
            return _blame_pass(item, program)
        program = _apply(item, program)
    fails: Fails = lambda p: lowering_fails(p, target, backend)  # noqa: E731
    if not fails(program):
        return None
    small = reduce_program(program, fails)
    *_, last = small.calls()
    return Blame(
        "lowering", printer.operator_name(last.target), last.name, module_path(last), fails(small), small, target
    )


def _blame_pass(item: Pass, program: Program) -> Blame:
    small = reduce_program(program, lambda p: pass_fails(item, p))
    try:
        notes = item.apply(small, Context()).rewrites
    except Exception:  # that is what it is blamed for
        notes = []
    site = notes[0] if notes else None
    *_, last = small.calls()
    node, module = (site.node, site.module) if site and site.node else (last.name, module_path(last))
    return Blame("pass", str(item), node, module, pass_fails(item, small), small)


# ---------------------------------------------------------------------- reducing


def reduce_program(program: Program, fails: Fails) -> Program:
    """Return the smallest program that still fails: fewer outputs, fewer calls, fewer samples."""
    values: dict[fx.Node, Any] = {}
    program.run(*program.probe, watch=values.__setitem__)
    calls = [n for n in program.calls() if is_tensor(n)]
    low, high = 0, len(calls) - 1  # bisection: the first call after which something is wrong
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(_until(program, calls[: middle + 1], values)) else (middle + 1, high)
    small = program
    if calls and fails(extract_subprogram(program, [calls[low]], values)):
        small = _fewer_calls(program, calls[low], values, fails)
    return _one_sample(small, fails)


def _until(program: Program, calls: Sequence[fx.Node], values: dict[fx.Node, Any]) -> Program:
    """Return the program of the first calls; its outputs are those that none of them reads."""
    inside = set(calls)
    return extract_subprogram(program, [n for n in calls if not inside & set(n.users)], values)


def _fewer_calls(program: Program, output: fx.Node, values: dict[fx.Node, Any], fails: Fails) -> Program:
    """Return the program of as few steps before the output as still fail; a call that can be an input becomes one."""
    depth, everything = 1, _producers(output, len(program.graph.nodes))
    inside = _producers(output, depth)
    while len(inside) < len(everything) and not fails(extract_subprogram(program, [output], values, inside)):
        depth += 1
        inside = _producers(output, depth)
    for node in sorted(inside - {output}):
        if is_tensor(node) and fails(extract_subprogram(program, [output], values, inside - {node})):
            inside = inside - {node}
    return extract_subprogram(program, [output], values, inside)


def _producers(node: fx.Node, depth: int) -> set[fx.Node]:
    """Return the calls that are fewer than ``depth`` steps before ``node``, and itself."""
    calls, edge = {node}, {node}
    for _ in range(depth - 1):
        edge = {n for e in edge for n in e.all_input_nodes if n.op == "call_function"} - calls
        calls |= edge
    return calls | {n for m in calls for n in m.all_input_nodes if n.op == "call_function" and not is_tensor(n)}


def _one_sample(program: Program, fails: Fails) -> Program:
    """Return the program on the first sample only, where it runs on one and still fails."""
    sizes = {len(v) for v in program.probe if isinstance(v, Tensor) and v.dim()}
    if len(sizes) != 1 or sizes == {1}:
        return program
    small = replace(
        program.clone(), probe=tuple(v[:1].clone() if isinstance(v, Tensor) and v.dim() else v for v in program.probe)
    )
    mode = small.fake_mode
    try:
        for node, value in zip(small.placeholders, small.probe):
            if isinstance(value, Tensor):
                with mode:
                    node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        small.propagate().verify()
        return small if fails(small) else program
    except Exception:  # a size is written down somewhere
        return program


def restore(listing: str, tensors: Path) -> Program:
    """Return a program from its text and the file of its constants and inputs."""
    from safetensors.torch import load_file

    values, program = load_file(tensors), parser.parse(listing)
    for name in program.constants:
        program.constants[name] = values[f"constant.{name}"]
    program.probe = tuple(values.get(f"input.{i}", v) for i, v in enumerate(program.probe))
    return program
