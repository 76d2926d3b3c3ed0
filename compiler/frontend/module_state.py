"""What a module holds, and how to change it for the time of a block: evaluation mode, other tensors, attributes as buffers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

INTERNAL = frozenset(vars(nn.Module()))  # attributes of every module
MAX_DEPTH = 4  # of objects and containers in attributes
MAX_ENTRIES = 10_000  # of a container that is looked into: a larger one holds data, not what forward keeps


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in evaluation mode for the time of the block, and give every module its own mode back after it."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def holding(model: nn.Module, state: Iterable[tuple[str, Tensor]]) -> Iterator[Callable[[], list[Tensor]]]:
    """Give ``model`` other tensors under these names for the time of the block, under all names of what is one tensor.

    Yields a function that returns what the model has under the names by then; the block may write into the tensors or replace them.
    """
    names, changed = [], []
    for name, tensor in state:
        owner, leaf = _owner(model, name)
        old = getattr(owner, leaf)
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        tables = (t for m in model.modules() for t in (m._parameters, m._buffers, vars(m)))
        changed += [(table, key, old, new) for table in tables for key, value in table.items() if value is old]
        names.append((owner, leaf))
    for table, key, _, new in changed:
        table[key] = new
    try:
        yield lambda: [getattr(owner, leaf).detach() for owner, leaf in names]
    finally:
        for table, key, old, _ in changed:
            table[key] = old


@contextlib.contextmanager
def idle_conversions() -> Iterator[None]:
    """Let ``module.to()`` do nothing, for the time of the block, where all its tensors are as they should be.

    Routers of transformers call it in forward, and torch cannot exchange the parameters of a module that is traced.
    """
    convert = nn.Module._apply

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        tensors = (*module.parameters(recurse), *module.buffers(recurse))
        return module if all(fn(t) is t for t in tensors) else convert(module, fn, recurse)

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = convert


@dataclass(frozen=True)
class Table:
    """A place where Python values are: the attributes of a module or of an object that it holds, or a list, tuple or dictionary there.

    ``entries`` is the table itself; ``path`` leads to it from the model: ``layers.0.seen``.
    """

    path: str
    entries: list[Any] | tuple[Any, ...] | dict[Any, Any]
    attributes: bool  # its keys are names of attributes

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield each value with its path, without those that every module has."""
        keyed = self.entries.items() if isinstance(self.entries, dict) else enumerate(self.entries)
        for key, value in keyed:
            if not self.attributes:
                yield f"{self.path}[{key!r}]", value
            elif key not in INTERNAL:
                yield f"{self.path}.{key}" if self.path else str(key), value


def tables(model: nn.Module) -> list[Table]:
    """Return all tables of the modules of ``model``, each once; objects are looked into to a depth of MAX_DEPTH."""
    result: list[Table] = []
    seen: set[int] = set()
    todo = [(Table(path, vars(module), True), 0) for path, module in model.named_modules()]
    while todo:
        table, depth = todo.pop(0)
        if id(table.entries) in seen or depth > MAX_DEPTH or len(table.entries) > MAX_ENTRIES:
            continue
        seen.add(id(table.entries))
        result.append(table)
        for path, value in table.items():
            if isinstance(value, (list, tuple, dict)):
                todo.append((Table(path, value, False), depth + 1))
            elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (Tensor, ModuleType)):
                todo.append((Table(path, vars(value), True), depth + 1))
    return result


@contextlib.contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Give every table of ``model``, after the block, what it held before, and plain tensors their elements: export writes into them."""
    entries = [t.entries for t in tables(model)]
    tensors = [getattr(*_owner(model, name)) for name in plain_tensors(model)]
    copies = [(t, t._version, t.detach().clone()) for t in tensors if not t.is_inference()]
    lists = [(e, list(e)) for e in entries if isinstance(e, list)]
    dictionaries = [(e, dict(e)) for e in entries if isinstance(e, dict)]
    try:
        yield
    finally:
        for tensor, version, copy in copies:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(copy)
        for values, old in lists:
            values[:] = old
        for values_by_key, old_by_key in dictionaries:
            for key in values_by_key.keys() - old_by_key.keys():
                del values_by_key[key]
            values_by_key.update(old_by_key)


def plain_tensors(model: nn.Module) -> list[str]:
    """Return the names of the tensors that are neither parameters nor buffers but plain attributes."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


@contextlib.contextmanager
def as_buffers(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Make the plain attributes of these names buffers for the time of the block; they are what they were after it."""
    attributes = [_owner(model, name) for name in names]
    values = [vars(owner).pop(leaf) for owner, leaf in attributes]
    for (owner, leaf), value in zip(attributes, values):
        owner.register_buffer(leaf, value.detach(), persistent=False)
    try:
        yield
    finally:
        for (owner, leaf), value in zip(attributes, values):
            owner._buffers.pop(leaf)
            owner._non_persistent_buffers_set.discard(leaf)
            vars(owner)[leaf] = value


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that has the tensor of a dotted name, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
