"""Run a compiled module. Needs the TVM runtime only: not the compiler, not the model, and torch only for torch tensors."""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

from thresher.runtime.memory import is_array, memory_of, span

PROFILE_RUNS, PROFILE_SECONDS = 7, 1.0  # every build makes a profile
ALIGNMENT = 64  # bytes; TVM's code assumes it, torch's allocator gives it, a view into a tensor may not have it


class TVMModule:
    """A loaded library with its weights. Calls from several threads wait for each other: the virtual machine has one stack.

    Args:
        library: the loaded code.
        weights: the constants in the order of the code.
        device: ``cpu`` or ``cuda``.
        placed: arrays that are on a device already, see :class:`thresher.runtime.weight_store.Weights`.
        complex_outputs: the indices of the results that are complex; the code holds complex numbers as pairs of real ones.
    """

    def __init__(
        self,
        library: Any,
        weights: Sequence[np.ndarray],
        device: str,
        placed: dict[tuple[int, str], Any] | None = None,
        complex_outputs: Sequence[int] = (),
    ):
        self.device = tvm.cuda(0) if device == "cuda" else tvm.cpu(0)
        self.machine = VirtualMachine(library, self.device)
        self.main = self.machine["main"]
        self.weights = weight_array(weights, self.device, placed)
        self.complex_outputs = complex_outputs
        self.weight_addresses = frozenset(w.data_ptr() for w in self.weights)
        self.lock = threading.Lock()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Compute flat outputs from flat inputs: all torch tensors, or all NumPy arrays. Torch tensors are not copied, in nor out."""
        arrays = all(isinstance(x, np.ndarray) for x in inputs)
        if arrays and (inputs or "torch" not in sys.modules):  # without inputs, tensors of torch where that is there
            values = [tvm.runtime.tensor(_array(x), self.device) for x in inputs]
            with self.lock:
                results = [_to_numpy(y) for y in self.main(*values, self.weights)]
            self._separate(results, ())
            for i in self.complex_outputs:
                results[i] = results[i].view(np.result_type(results[i].dtype, np.complex64))[..., 0]
            return results
        import torch

        values = [tvm_ffi.from_dlpack(aligned(x)) for x in inputs]
        with self.lock:
            outputs = [torch.from_dlpack(y) for y in self.main(*values, self.weights)]
        self._separate(outputs, inputs)
        for i in self.complex_outputs:
            outputs[i] = torch.view_as_complex(outputs[i])
        return outputs

    def _separate(self, outputs: list[Any], inputs: Sequence[Any]) -> None:
        """Copy outputs that begin where an input, a weight or an earlier output does: code hands on what it only reshapes."""
        addresses = {x.data_ptr() for x in inputs}
        for i, y in enumerate(outputs):
            start, end = span(y)
            if end > start and (start in addresses or start in self.weight_addresses):
                outputs[i] = y.copy() if is_array(y) else y.clone()
            addresses.add(start)

    def profile(self, inputs: Sequence[Any], kernels: Container[str]) -> list[tuple[str, float]]:
        """Return the calls of ``kernels`` in the order in which they run, each with the median of its milliseconds.

        They are measured in PROFILE_RUNS runs, or in as many as end within PROFILE_SECONDS.
        """
        began, started, calls = time.perf_counter(), 0.0, []

        def watch(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            nonlocal started
            if name in kernels:
                if not before:
                    calls.append((name, 1e3 * (time.perf_counter() - started)))
                started = time.perf_counter()
            return 0

        values = [tvm_ffi.from_dlpack(aligned(x)) for x in inputs]
        runs: list[list[tuple[str, float]]] = []
        with self.lock:
            self.machine.set_instrument(tvm_ffi.convert(watch))
            try:
                while len(runs) < PROFILE_RUNS and (not runs or time.perf_counter() - began < PROFILE_SECONDS):
                    self.main(*values, self.weights)
                    runs.append(list(calls))
                    calls.clear()
            finally:
                self.machine.set_instrument(None)
        return [(same[0][0], statistics.median(t for _, t in same)) for same in zip(*runs)]


def weight_array(weights: Sequence[np.ndarray], device: Any, placed: dict[tuple[int, str], Any] | None = None) -> Any:
    """Return the weights on the device as the one argument that compiled code takes; arrays in ``placed`` are not copied again."""
    placed = {} if placed is None else placed
    for array in weights:
        if (id(array), str(device)) not in placed:
            placed[id(array), str(device)] = tvm.runtime.tensor(np.ascontiguousarray(array), device)
    return tvm_ffi.convert([placed[id(array), str(device)] for array in weights])


def load_code(code: bytes) -> Any:
    """Return the library in ``code``. The system's loader wants a file; it is gone when this returns."""
    with tempfile.TemporaryDirectory(prefix="thresher-") as folder:
        path = Path(folder) / "model.so"
        path.write_bytes(code)
        return tvm.runtime.load_module(str(path))


def _to_numpy(output: Any) -> np.ndarray:
    """Return an array that keeps the memory of ``output``; bfloat16, which NumPy does not read from others, is copied."""
    return output.numpy() if str(output.dtype) == "bfloat16" else np.from_dlpack(output)


def _array(x: np.ndarray) -> np.ndarray:
    """Return ``x`` contiguous, complex numbers as pairs of real ones."""
    x = np.ascontiguousarray(x).reshape(x.shape)  # which makes a number an array of one dimension
    return x.view(x.real.dtype).reshape(*x.shape, 2) if np.iscomplexobj(x) else x


def aligned(x: Any) -> Any:
    """Return ``x`` contiguous, at an address that compiled code may load whole registers from; copied only where it is not.

    Complex numbers become pairs of real ones.
    """
    x = x.detach()
    if x.is_complex():
        import torch

        x = torch.view_as_real(x.resolve_conj())
    x = (x.resolve_neg() if x.is_neg() else x).contiguous()
    if 0 in x.shape:  # contiguous by any strides for torch, by one alone for TVM
        return x.new_empty(0).as_strided(x.shape, [math.prod(x.shape[d + 1 :]) for d in range(x.dim())])
    if x.data_ptr() % ALIGNMENT == 0:
        return x
    copy = x.new_empty(x.shape)
    if x.device.type == "cpu":  # by one thread: torch's would spin for a while afterwards, and ours wait for a core
        np.copyto(memory_of(copy), memory_of(x))
    else:
        copy.copy_(x)
    return copy
