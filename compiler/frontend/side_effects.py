"""What a model changes while it runs, and torch.export does not say: attributes, containers of the caller, shapes in place.

torch.export tells of tensors that are written: buffers, parameters, inputs. It says nothing of a number that forward counts up, a list that
it appends to, or a tensor that it keeps as a plain attribute: the graph has the values of the first call for ever. Two hooks on the model
look at all of these before forward runs and after it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from thresher.errors import CaptureError
from thresher.frontend.module_state import plain_tensors, tables
from thresher.runtime.comparison import compare

NUMBERS = (bool, int, float, complex, str, bytes, type(None))
RUNS = 2  # on the example, and on random numbers


class SideEffects:
    """The changes of one run of a model.

    ``tensors`` are the names of the plain attributes that held one tensor and hold another one now; ``others`` are all other places with
    another value: numbers, and what is in containers and objects.
    """

    def __init__(self) -> None:
        self.tensors: set[str] = set()
        self.others: list[str] = []

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Watch every run of ``model`` in the block.

        The run raises :class:`CaptureError` where it replaces a buffer by one of another shape, changes the shape of an argument in
        place, or changes a container of the caller without returning what it puts there.
        """
        before: list[Any] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            before[:] = [_buffers(model), _arguments((args, kwargs)), attributes(model)]

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            buffers, arguments, old = before
            _check_buffers(buffers, _buffers(model))
            _check_arguments(arguments, _arguments((args, kwargs)), output)
            self._note(old, attributes(model), plain_tensors(model))

        hooks = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, old: Mapping[str, Any], new: Mapping[str, Any], plain: Collection[str]) -> None:
        for name in dict.fromkeys([*old, *new]):
            if name in old and name in new and _same(old[name], new[name]):
                continue
            if isinstance(old.get(name), Tensor) and name in plain:
                self.tensors.add(name)
            elif name not in self.others:
                self.others.append(name)


# ---------------------------------------------------------------------- attributes


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return the tensors and numbers in the plain attributes of all modules, by where they are: ``layers.0.seen``, ``cache.keys[2]``."""
    return {path: v for table in tables(model) for path, v in table.items() if isinstance(v, (Tensor, *NUMBERS))}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and isinstance(a, NUMBERS) and (a == b or (a != a and b != b))


# ---------------------------------------------------------------------- buffers and arguments


def _buffers(model: nn.Module) -> dict[str, str]:
    return {name: f"{t.dtype} {tuple(t.shape)}" for name, t in model.named_buffers(remove_duplicate=False)}


def _check_buffers(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name, kind in old.items():
        if new.get(name) != kind:
            raise CaptureError(
                f"the model replaces its buffer {name!r}, {kind}, by {new.get(name, 'nothing')}; what a model keeps must have one shape: "
                "make it as large as it may become, and write into a part of it"
            )


def _arguments(tree: Any) -> dict[str, tuple[Any, tuple]]:
    """Return the leaves of the arguments by their paths, each with its shape, strides and memory.

    They are no text yet: of two free sizes that turn out to be one, both have the name of that one then.
    """
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {
        pytree.keystr(path[1:]): (value, _layout(value))
        for path, value in leaves  # the first key tells positional from keyword arguments
    }


def _layout(value: Any) -> tuple:
    return (tuple(value.shape), value.stride(), value.untyped_storage()._cdata) if isinstance(value, Tensor) else ()


def _check_arguments(old: Mapping[str, tuple[Any, tuple]], new: Mapping[str, tuple[Any, tuple]], output: Any) -> None:
    returned = {id(v) for v in pytree.tree_leaves(output)}
    for path, (value, layout) in new.items():
        if path not in old or not _same(old[path][0], value):
            if id(value) not in returned:
                raise CaptureError(
                    f"the model puts something into its argument at {path} that it does not return: a compiled model cannot change the "
                    "containers of its caller. Return it, or write into the tensor that is there (.copy_())"
                )
        elif str(layout) != str(old[path][1]):
            raise CaptureError(
                f"the model changes the shape, the strides or the memory of its argument at {path} in place (resize_, transpose_, set_, "
                ".data); use the operator that returns a tensor"
            )
    if gone := sorted(old.keys() - new.keys()):
        raise CaptureError(
            f"the model removes its argument at {gone[0]} from a container of its caller; leave it there"
        )


# ---------------------------------------------------------------------- the influence of attributes


def depends_on_earlier_calls(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Return whether a second call on the same arguments gives something else than the first, for a copy of ``model``.

    It is called on ``args`` and ``kwargs`` and, again twice, on these with noise.
    """
    generator = torch.Generator().manual_seed(0)
    # a tensor that was computed, as a pruner's weight is, cannot be copied with its history
    memo = {id(t): t.detach().clone() for t in attributes(model).values() if isinstance(t, Tensor) and not t.is_leaf}
    model = copy.deepcopy(model, memo)

    def noisy(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value + torch.randn(value.shape, generator=generator).to(value)

    def results(inputs: tuple[tuple, dict[str, Any]]) -> list[Any]:
        args, kwargs = pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, inputs)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return [v.clone() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(model(*args, **kwargs))]

    inputs = (args, kwargs)
    for _ in range(RUNS):
        try:
            divergence = compare(results(inputs), results(inputs))
        except Exception:  # it cannot be called again
            return True
        if divergence.reason or divergence.relative > 0:
            return True
        inputs = pytree.tree_map(noisy, inputs)
    return False
