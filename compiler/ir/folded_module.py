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
    """The module that :func:`thresher.rewrite` returns. It takes and returns what the original model does.

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
        return unfold(program.original.state, program.lineage, exact, current)


def to_module(program: Program, certificate: Any = None, ledger: Sequence[Any] = ()) -> FoldedModule:
    """Return an ``nn.Module`` that computes what ``program`` does on the user's structure.

    Constants whose role is ``PARAMETER`` are its parameters, the others its buffers. ``certificate`` and ``ledger`` are kept on the module.
    """
    rounded, trained = program.rounded(), program.trainable()
    root: dict[str, Any] = {
        name: torch.nn.Parameter(t.detach().clone()) if name in trained else t.detach()
        for name, t in rounded.constants.items()
    }
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


def _class_name(name: str) -> str:
    cleaned = "".join(c if c.isalnum() else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"Model_{cleaned}"


def _codegen(in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec, names: list[str]) -> Any:
    """Return fx's code generator for the user's nesting of arguments and results."""
    args_spec, kwargs_spec = in_spec.children()
    positional = [f"arg_{i}" for i in range(args_spec.num_children)]
    return _PyTreeCodeGen(_PyTreeInfo(positional + list(kwargs_spec.context or []), in_spec, out_spec))
