"""Numbers and sizes that a model takes from tensors while it is exported, and that no input changes: ``if self.mask_probs[i] > 0:``.

torch.export knows the numbers of inputs, parameters and buffers no more than those of what is computed from them, and ends where Python
asks for one. A compiled model has constants, so what is computed from these alone has one value, and control flow and sizes may depend on
it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from thresher.errors import CaptureError

aten = torch.ops.aten
READS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, aten.item.default,
}  # fmt: skip
#: Where they take sizes, they take tensors without dimensions, too: torch reads those in C++, where no mode sees it.
TAKE_SIZES = {
    functional.pad, functional.interpolate, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.linspace, torch.narrow,
    torch.split, Tensor.split, torch.reshape, torch.roll, Tensor.view, Tensor.reshape, Tensor.expand, Tensor.repeat, Tensor.narrow,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.roll, Tensor.unflatten,
}  # fmt: skip
#: Their elements are whatever the memory held.
UNDEFINED = {aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default}
INTEGERS = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
MOST_CALLS = 1000  # of the computation of one number


class KnownNumbers(TorchFunctionMode):
    """While it is active, a number that Python reads from a tensor of the exported ``model`` is its value, where no input changes that, and
    so is a size; a result whose sizes depend on values is a constant there.

    ``read`` are the names of the parameters and buffers that such numbers were computed from.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.tensors = dict(_state(model))
        self.read: set[str] = set()

    def __torch_function__(
        self, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS and args and (value := self.value(args[0])) is not None:
            with _disable_current_modes():
                return func(value)
        if func is Tensor.__getitem__:
            args = (args[0], self._known_index(args[1]))
        elif func in TAKE_SIZES:
            args, kwargs = args[:1] + pytree.tree_map(self._number, args[1:]), pytree.tree_map(self._number, kwargs)
        return pytree.tree_map(self._with_known_sizes, func(*args, **(kwargs or {})))

    def _number(self, leaf: Any) -> Any:
        """Return what gives a size as a number, where it is a known tensor."""
        gives_size = isinstance(leaf, Tensor) and leaf.dim() == 0 and leaf.dtype in INTEGERS
        known = self.value(leaf) if gives_size else None
        return leaf if known is None else int(known)

    def _known_index(self, index: Any) -> Any:
        """Return an index with numbers as the ends of its slices, and the numbers of what a mask selects, where these are known."""
        if not isinstance(index, tuple):
            known = self._known_index((index,))
            return known[0] if len(known) == 1 else known
        parts: list[Any] = []
        for part in index:
            if isinstance(part, slice):
                parts.append(slice(*map(self._number, (part.start, part.stop, part.step))))
            elif (
                isinstance(part, Tensor)
                and part.dtype is torch.bool
                and part.dim()
                and (mask := self.value(part)) is not None
            ):
                with _disable_current_modes():
                    selected = mask.nonzero(as_tuple=True)
                parts += map(aten.lift_fresh_copy.default, selected)
            else:
                parts.append(part)
        return tuple(parts)

    def _with_known_sizes(self, result: Any) -> Any:
        """Return a result as it is, or as a constant where its sizes are not known but its value is."""
        if not isinstance(result, Tensor) or not any(map(_depends_on_values, result.shape)):
            return result
        known = self.value(result)
        # as what torch.tensor() makes in a model: it may be written into
        return result if known is None else aten.lift_fresh_copy.default(known)

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the value of a tensor that is traced; None where an input changes it, or where it is not known."""
        mode = get_proxy_mode()
        slot = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
        if slot is None:
            return None
        names = {}
        for name, fake in _state(self.model):
            held = get_proxy_slot(fake, mode.tracer, None)
            if held is not None:
                names[held.proxy.node] = name
        calls = _calls_of(slot.proxy.node, names)
        if calls is None:
            return None
        self.read |= {names[n] for n in calls if n in names}
        values = {n: self.tensors[names[n]] for n in calls if n in names}
        with _disable_current_modes(), torch.no_grad():
            return _evaluate(slot.proxy.node, calls, values, mode.tracer.root)

    def check(self, program: ExportedProgram) -> None:
        """Raise :class:`CaptureError` where the model writes a tensor that a number was computed from: the next call may have another.

        ``program`` has to be decomposed: before that, it says nothing of what is written.
        """
        written = self.read & set(program.graph_signature.buffers_to_mutate.values())
        if written:
            raise CaptureError(
                f"control flow of the model depends on {', '.join(sorted(written))}, which it writes; compute both sides and select with "
                "torch.where"
            )


def _depends_on_values(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _calls_of(node: fx.Node, names: Mapping[fx.Node, str]) -> list[fx.Node] | None:
    """Return what the value of ``node`` comes from, in order: what it is computed from, and what is written into that.

    None where that is not constants alone, or not the same each time.
    """
    calls = [node]
    for call in calls:  # it grows
        if call not in names and call.op != "get_attr" and not _repeatable(call):
            return None
        calls += dict.fromkeys(n for n in (*call.all_input_nodes, *_same_memory(call)) if n not in calls)
        if len(calls) > MOST_CALLS:
            return None
    needed = set(calls)
    return [n for n in node.graph.nodes if n in needed]


def _repeatable(call: fx.Node) -> bool:
    tags = getattr(call.target, "tags", ())
    return call.op == "call_function" and torch.Tag.nondeterministic_seeded not in tags and call.target not in UNDEFINED


def _same_memory(value: fx.Node) -> list[fx.Node]:
    """Return the calls that make views of ``value``, or write into it."""
    users = [(user, getattr(user.target, "_schema", None)) for user in value.users]
    return [
        u
        for u, schema in users
        if u.target is operator.getitem or (schema and any(a.alias_info for a in schema.arguments))
    ]


def _evaluate(node: fx.Node, calls: list[fx.Node], values: dict[fx.Node, Any], root: Any) -> Any:
    """Return the value of ``node`` by running ``calls`` in order; ``values`` are those of parameters and buffers, which are copied."""
    values = {n: value.clone() for n, value in values.items()}
    for call in calls:
        if call.op == "get_attr":
            values[call] = operator.attrgetter(call.target)(root).clone()
        elif call not in values:
            args, kwargs = fx.node.map_arg((call.args, call.kwargs), values.__getitem__)
            values[call] = call.target(*args, **kwargs)
    return values[node]
