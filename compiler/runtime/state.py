"""Models that write: into their own state, which lasts from one call to the next, and into the tensors that the caller gives them.

Compiled code computes new values from old ones and writes nothing. A call hands it the arguments and the state, and copies the new values
over the old ones when all of them are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from thresher.errors import InputError
from thresher.runtime.memory import Region, as_array, is_array, memory_of, repeats, shared_pair
from thresher.runtime.signature import Signature
from thresher.runtime.tensor_spec import is_tensor

Run = Callable[[Sequence[Any]], list[Any]]


class State(Mapping[str, Any]):
    """The tensors that a compiled model keeps from one call to the next, by name; each call writes them in place.

    They may be read and written between calls; a call of another thread waits until ``lock`` is free. ``initial`` are their values before
    the first call, which :meth:`reset` gives them back.
    """

    def __init__(self, initial: Mapping[str, Any]):
        self.initial = dict(initial)
        self.lock = threading.RLock()
        self._tensors = {name: _copy(value) for name, value in initial.items()}

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def reset(self) -> None:
        """Write the initial values: the next call is the first one again."""
        with self.lock:
            for name, tensor in self._tensors.items():
                _write(tensor, self.initial[name])

    def matching(self, names: Sequence[str], arguments: Sequence[Any]) -> list[Any]:
        """Return the tensors of these names, as NumPy arrays of the same memory where the arguments are such arrays.

        Raises :class:`InputError` for a name that is not there, and for tensors on a device whose memory NumPy does not reach.
        """
        if missing := [name for name in names if name not in self._tensors]:
            raise InputError(
                f"the model keeps {missing[0]!r}, and the state that it was given has {', '.join(self._tensors)}"
            )
        tensors = [self._tensors[name] for name in names]
        if not any(map(is_array, arguments)) or all(map(is_array, tensors)):
            return tensors
        if any(t.device.type != "cpu" for t in tensors):
            raise InputError("the state of this model is on a GPU: give torch tensors, not NumPy arrays")
        return [as_array(t) for t in tensors]


def call(signature: Signature, run: Run, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what the model returns for these arguments, and write what it writes. Calls with the same state wait for each other.

    Raises :class:`InputError` for an argument that does not fit the signature or cannot be written; nothing is written then.
    """
    leaves = signature.flatten(args, kwargs)
    if not signature.writes:
        return signature.assemble(run(signature.check(leaves)))
    with state.lock:
        return signature.assemble(_run_and_write(signature, run, [*leaves, *state.matching(signature.state, leaves)]))


def _run_and_write(signature: Signature, run: Run, flat: Sequence[Any]) -> list[Any]:
    """Return the tensor results of the user; write the other ones into the inputs that they are new values of."""
    tensors = signature.check(flat)
    _check_memory(signature, flat)
    targets = [flat[i] for i in signature.writes]
    region, outputs = Region(targets), run(tensors)
    outputs = [_copy(value) if region.touches(value) else value for value in outputs]  # an input may come out as it is
    count = len(outputs) - len(targets)
    for target, value in zip(targets, outputs[count:]):
        _write(target, value)
    return outputs[:count]


def _check_memory(signature: Signature, flat: Sequence[Any]) -> None:
    """Raise :class:`InputError` where an argument that is to be written cannot be, or shares memory with another one."""
    names = [spec.name for spec in signature.inputs]
    for i in signature.writes:
        if reason := _why_not_writable(flat[i]):
            raise InputError(f"the model writes into argument {names[i]!r}, which {reason}")
    indices = [i for i, value in enumerate(flat) if is_tensor(value)]
    pair = shared_pair([flat[i] for i in indices], {indices.index(i) for i in signature.writes})
    if pair is not None:
        a, b = sorted((indices[k] for k in pair), key=lambda i: i not in signature.writes)
        raise InputError(
            f"the model writes into argument {names[a]!r}, which shares memory with {names[b]!r}: a compiled model takes both for "
            f"values of their own. Give a copy of one of them ({'.copy()' if is_array(flat[a]) else '.clone()'})"
        )


def _why_not_writable(tensor: Any) -> str:
    """Return the reason why a tensor cannot be written, with the cure; empty where it can be."""
    if repeats(tensor):
        return "repeats an element of its memory, as expanded tensors do; give a copy of it"
    if is_array(tensor):
        return "" if tensor.flags.writeable else "is read-only; give a copy of it (.copy())"
    try:
        _mark_written(tensor)
    except RuntimeError:  # of an inference tensor
        return "was made in inference mode, and is written outside of it; give a copy of it (.clone())"
    return ""


# ---------------------------------------------------------------------- tensors of either kind


def _copy(value: Any) -> Any:
    return value.copy() if is_array(value) else value.detach().clone()


def _write(target: Any, value: Any) -> None:
    if is_array(target):
        np.copyto(target, value, casting="no")
        return
    target = target.detach()
    if target.device.type == "cpu" and target.is_contiguous() and target.numel():
        # by one thread: torch's would spin for a while afterwards, and ours wait for a core
        np.copyto(memory_of(target), memory_of(value.contiguous()))
        _mark_written(target)
    else:
        target.copy_(value)


def _mark_written(tensor: Any) -> None:
    """Tell torch that a tensor is written, which its gradients and compiled graphs ask for; it raises where that is not allowed."""
    tensor.detach().as_strided((0,), (1,)).zero_()
