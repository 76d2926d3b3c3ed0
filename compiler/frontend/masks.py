"""The masks of pruners: every way of naming dead weights becomes zeros in a copy of the model.

Masks that torch already carries need nothing: ``torch.nn.utils.prune`` (with its masks or after ``remove``), parametrizations and plain
zeros are found by the passes. For what lies outside the model, ``apply_masks`` takes

* masks by parameter:  ``{"conv1.weight": tensor}``, a mask of the parameter's shape, or of its rows (dimension 0);
* indices by module:   ``{"conv1": [1, 5]}``, output channels of a convolution or linear layer (rows of an embedding);
* a Torch-Pruning history: ``[("conv1", True, [1, 5]), ...]``, as ``DependencyGraph.pruning_history()`` gives it: in order, the
  indices of a later entry count what the earlier ones left, and what is coupled to the named layer by residuals goes with it
  (Fang et al., DepGraph, CVPR 2023).

All of them fold to the same small model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from thresher.analysis.slices.operators import facts_of_constants, rule_of
from thresher.analysis.slices.ties import Equal, Key
from thresher.errors import InputError
from thresher.frontend.capture import capture
from thresher.ir.nodes import getitem_users, is_tensor
from thresher.ir.program import Program

History = Sequence[tuple[str, bool, Sequence[int]]]
Masks = Mapping[str, Tensor | Sequence[int]] | History
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def apply_masks(model: nn.Module, masks: Masks, args: Sequence[Any] = (), kwargs: dict | None = None) -> nn.Module:
    """Return a copy of ``model`` in which the weights that ``masks`` names are 0. ``args``: example inputs, which only a history needs.

    Raises:
        InputError: for a name that the model does not have, a mask that does not fit, or an index that is out of range.
    """
    model = copy.deepcopy(model)
    if not isinstance(masks, Mapping):
        return _apply_history(model, masks, args, kwargs)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            if isinstance(mask, Tensor) and name in parameters:
                _apply_mask(name, parameters[name], mask)
            elif name in modules and not isinstance(mask, Tensor):
                _zero_outputs(name, modules[name], list(mask))
            else:
                kind = "parameter" if isinstance(mask, Tensor) else "module"
                raise InputError(f"masks: the model has no {kind} {name!r}")
    return model


def _apply_mask(name: str, parameter: Tensor, mask: Tensor) -> None:
    if mask.shape == parameter.shape:
        parameter.mul_(mask.to(parameter.dtype))
    elif mask.dim() == 1 and len(mask) == len(parameter):
        parameter.mul_(mask.to(parameter.dtype).reshape(-1, *[1] * (parameter.dim() - 1)))
    else:
        raise InputError(
            f"masks: {name!r} has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}; "
            "give one of the same shape, or one value per row"
        )


def _zero_outputs(name: str, module: nn.Module, indices: list[int]) -> None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise InputError(f"masks: module {name!r} ({type(module).__name__}) has no weight whose outputs could go")
    bias = getattr(module, "bias", None)
    _check(name, indices, _outputs(module))
    if isinstance(module, TRANSPOSED):  # [I, O / groups, *k]
        rows = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        for index in indices:
            rows[divmod(index, weight.shape[1])] = 0
    else:
        weight[indices] = 0
    if isinstance(bias, Tensor):
        bias[indices] = 0


def _outputs(module: Any) -> int:
    return module.weight.shape[1] * module.groups if isinstance(module, TRANSPOSED) else len(module.weight)


def _check(name: str, indices: list[int], count: int) -> None:
    if wrong := [i for i in indices if not 0 <= i < count]:
        raise InputError(f"masks: module {name!r} has {count} outputs, there is no {wrong[0]}")


# ---------------------------------------------------------------------- histories


def _apply_history(model: nn.Module, history: Any, args: Sequence[Any], kwargs: dict | None) -> nn.Module:
    """Zero what each entry removes: everywhere in its coupled set, so that no consumer reads it any more."""
    modules, names = dict(model.named_modules()), model.state_dict(keep_vars=True)
    coupled = _Coupled(capture(model, args, kwargs))
    alive: dict[int, list[int]] = {}
    for entry in history:
        try:
            name, outputs, indices = entry
        except (TypeError, ValueError) as error:
            raise InputError(f"masks: cannot read the history entry {entry!r}: (module, is_output, indices)") from error
        if name not in modules or not isinstance(getattr(modules[name], "weight", None), Tensor):
            raise InputError(f"masks: the model has no module {name!r} with a weight")
        number, constants, count = coupled.parameters_of(f"{name}.weight", modules[name], outputs)
        remaining = alive.setdefault(number, list(range(count)))
        _check(name, list(indices), len(remaining))
        removed = {remaining[i] for i in indices}
        alive[number] = [i for i in remaining if i not in removed]
        with torch.no_grad():
            for constant, dim in constants:
                names[constant].index_fill_(dim, torch.tensor(sorted(removed)), 0)
    return model


class _Coupled:
    """The coupled sets of a captured model in terms of its parameters: which dimensions of which must lose the same indices."""

    def __init__(self, program: Program):
        self.graph = nx.Graph()
        self.rigid: dict[Key, str] = {}
        facts = facts_of_constants(program)
        for node in program.calls():
            ties = rule_of(node).constraints(node, facts) if is_tensor(node) else []
            if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
                result = getitem_users(node)[0]
                affine = [(n, 0) for n in node.args[1:5] if n is not None]
                nx.add_path(self.graph, [(node.args[0], 1), (result, 1), *affine])
            for tie in ties:
                if isinstance(tie, Equal):
                    self.graph.add_edge(*tie.keys)
                elif tie.joins:
                    self.rigid |= dict.fromkeys(tie.keys, str(tie.node.target))
        self.program = program
        self.numbers: dict[Key, int] = {}
        for number, keys in enumerate(nx.connected_components(self.graph)):
            self.numbers |= dict.fromkeys(keys, number)

    def parameters_of(self, weight: str, module: nn.Module, outputs: bool) -> tuple[int, list[tuple[str, int]], int]:
        """Return the number of the set of ``weight``, its parameters with their dimensions, and its size."""
        node = next((n for n in self.program.graph.nodes if n.op == "get_attr" and n.target == weight), None)
        dim = 0 if bool(outputs) != isinstance(module, TRANSPOSED) else 1
        if node is None or (node, dim) not in self.numbers:
            raise InputError(
                f"masks: {weight!r} is not used, or its channels are not cut one by one; give masks instead"
            )
        number = self.numbers[node, dim]
        keys = [key for key, n in self.numbers.items() if n == number]
        if operator := next((self.rigid[key] for key in keys if key in self.rigid), None):
            raise InputError(
                f"masks: the channels of {weight!r} are coupled through {operator}; give masks instead of a history"
            )
        parameters = [(str(n.target), d) for n, d in keys if n.op == "get_attr" and isinstance(d, int)]
        return number, parameters, int(node.meta["val"].shape[dim])
