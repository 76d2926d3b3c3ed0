"""A program as a torch module: smaller than the original, trainable, and with a way back to the original's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from thresher.ir.lineage import Values, unfold
from thresher.ir.program import Program

if TYPE_CHECKING:
    from collections.abc import Sequence


class FoldedModule(fx.GraphModule):
    """The module that :func:`thresher.rewrite` returns. It takes and returns what the original model does, and writes what that writes.

    ``program`` is what it was made from; ``certificate`` (:class:`~thresher.verification.certificate.Certificate`, or None) proves the
    fold; ``ledger`` lists what each approximate pass spent of the budget (:class:`~thresher.approximation.ledger.Spent`).
    """

    program: Program
    certificate: Any
    ledger: Sequence[Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedModule:
        """Return a module of its own on the same program: fx's copy would be a plain GraphModule that has forgotten the way back."""
        module = to_module(self.program, self.certificate, self.ledger)
        module.load_state_dict(self.state_dict())
        for mine, its in zip(self.parameters(), module.parameters(), strict=True):
            its.requires_grad_(mine.requires_grad)
        return module.train(self.training)

    def unfold(self) -> Values:
        """Return the ``state_dict`` of the original model, in its shapes: what was cut as it was, everything else as it is here now.

        Raises :class:`ProgramError` naming parameters that changed and that the original has no place for.
        """
        program = self.program.rounded()
        here = dict(self.named_parameters()) | dict(self.named_buffers())
        current = {name: here[name].detach().cpu() for name in program.constants}
        exact = self.program.constants
        same = {name: torch.equal(value, program.constants[name]) for name, value in current.items()}
        current = {name: exact[name] if same[name] else value for name, value in current.items()}
        original = unfold(program.original.state, program.lineage, exact, current)
        for name in program.state:  # under all names of what is one tensor
            old = program.original.state.get(name)
            aliases = [
                n for n, t in program.original.state.items() if old is not None and t.data_ptr() == old.data_ptr()
            ]
            original |= {alias: here[name].detach().cpu() for alias in aliases}
        return original


def to_module(program: Program, certificate: Any = None, ledger: Sequence[Any] = ()) -> FoldedModule:
    """Return an ``nn.Module`` that computes what ``program`` does on the user's structure.

    Constants whose role is ``PARAMETER`` are its parameters, the others and the state its buffers. ``certificate`` and ``ledger`` are kept
    on the module.
    """
    rounded, trained = program.rounded(), program.trainable()
    root: dict[str, Any] = {
        name: torch.nn.Parameter(t.detach().clone()) if name in trained else t.detach()
        for name, t in rounded.constants.items()
    }
    root |= {name: t.detach().clone() for name, t in program.initial_state.items()}
    _write_back(rounded)
    graph, output = rounded.graph, rounded.output
    module = FoldedModule(root, graph, class_name=_class_name(program.name))
    module.program, module.certificate, module.ledger = program, certificate, ledger
    for name, value in root.items():  # fx registers what it copies as buffers unless told otherwise
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        if isinstance(value, torch.nn.Parameter) and leaf not in holder._parameters:
            holder._buffers.pop(leaf, None)
            holder.register_parameter(leaf, value)
    graph.set_codegen(_codegen(program.in_spec, program.out_spec, [n.name for n in rounded.placeholders]))
    output.args = (list(output.args[0]),)
    module.recompile()
    return module


def _write_back(program: Program) -> None:
    """Replace the placeholders of the state by buffers, and the outputs that are written by calls that write them.

    The graph reads copies of what it writes: gradients need the values from before.
    """
    written, output = program.written(), program.output
    kept = dict(zip(program.placeholders[len(program.placeholders) - len(program.state) :], program.state))
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    targets = {}
    for node in written:
        with program.graph.inserting_before(first):
            target = program.graph.get_attr(kept[node]) if node in kept else node
            copy = program.graph.call_function(torch.ops.aten.clone.default, (target,))
        node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
        targets[node] = target
    values = output.args[0][len(output.args[0]) - len(written) :]
    with program.graph.inserting_before(output):
        for target, value in zip(targets.values(), values):
            program.graph.call_function(torch.ops.aten.copy_.default, (target, value))
    output.args = (output.args[0][: len(output.args[0]) - len(written)],)
    for node in kept:
        program.graph.erase_node(node)


def _class_name(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"Model_{cleaned}"


def _codegen(in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, names: list[str]) -> Any:
    """Return fx's code generator for the user's nesting of arguments and results."""
    args_spec, kwargs_spec = in_spec.children()
    positional = [f"arg_{i}" for i in range(args_spec.num_children)]
    return _PyTreeCodeGen(_PyTreeInfo(positional + list(kwargs_spec.context or []), in_spec, out_spec))
