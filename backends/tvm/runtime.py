"""Running a compiled module. Needs the TVM runtime only: not the compiler, not the model, and torch only if torch tensors are given."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime.vm import VirtualMachine

ALIGNMENT = 64  # bytes; TVM's code assumes it, torch's allocator gives it, a view into a tensor may not have it
LIBRARY, WEIGHTS = "model.so", "weights.safetensors"


class TVMModule:
    """A loaded library with its weights. Calls from several threads wait for each other: the virtual machine has one stack."""

    def __init__(self, library: Any, weights: Sequence[np.ndarray], device: str):
        self.device = tvm.cuda(0) if device == "cuda" else tvm.cpu(0)
        self.machine = VirtualMachine(library, self.device)
        self.main = self.machine["main"]
        self.weights = weight_array(weights, self.device)
        self.lock = threading.Lock()

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """Flat inputs, all torch tensors or all NumPy arrays; outputs of the same kind. No copies on the way in or out."""
        if all(isinstance(x, np.ndarray) for x in inputs):
            values = [tvm.runtime.tensor(np.ascontiguousarray(x), self.device) for x in inputs]
            with self.lock:
                return [
                    np.from_dlpack(y) for y in self.main(*values, self.weights)
                ]  # owns the memory; .numpy() does not
        import torch

        values = [tvm_ffi.from_dlpack(_aligned(x)) for x in inputs]
        with self.lock:
            return [torch.from_dlpack(y) for y in self.main(*values, self.weights)]

    def profile(self, inputs: Sequence[Any], kernels: Container[str], rounds: int = 7) -> list[tuple[str, float]]:
        """The calls of ``kernels`` in the order in which they run, each with the median of its milliseconds."""
        started, calls = 0.0, []

        def watch(function: Any, name: str, before: bool, result: Any, *arguments: Any) -> int:
            nonlocal started
            if name in kernels:
                if not before:
                    calls.append((name, 1e3 * (time.perf_counter() - started)))
                started = time.perf_counter()
            return 0

        values = [tvm_ffi.from_dlpack(_aligned(x)) for x in inputs]
        runs = []
        with self.lock:
            self.machine.set_instrument(tvm_ffi.convert(watch))
            try:
                for _ in range(rounds):
                    self.main(*values, self.weights)
                    runs.append(list(calls))
                    calls.clear()
            finally:
                self.machine.set_instrument(None)
        return [(same[0][0], statistics.median(t for _, t in same)) for same in zip(*runs)]


def weight_array(weights: Sequence[np.ndarray], device: Any) -> Any:
    """The weights on the device, as the one argument that compiled code takes."""
    return tvm_ffi.convert([tvm.runtime.tensor(np.ascontiguousarray(w), device) for w in weights])


def _aligned(x: Any) -> Any:
    """A contiguous tensor at an address that compiled code may load whole registers from; a copy only where ``x`` is neither."""
    x = x.detach().contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def read_weights(path: Path, dtypes: Sequence[str]) -> list[np.ndarray]:
    """The weights in the order of the function's parameters. bfloat16 is stored as its bits."""
    from safetensors.numpy import load_file

    stored = load_file(path)
    arrays = []
    for i, dtype in enumerate(dtypes):
        array = stored[f"w{i}"]
        if dtype == "bfloat16":
            import ml_dtypes

            array = array.view(ml_dtypes.bfloat16)
        arrays.append(array)
    return arrays


def write_weights(path: Path, weights: Sequence[np.ndarray]) -> list[str]:
    """Write the weights; returns their dtypes."""
    from safetensors.numpy import save_file

    bits = [np.ascontiguousarray(w.view(np.uint16) if str(w.dtype) == "bfloat16" else w) for w in weights]
    save_file({f"w{i}": w for i, w in enumerate(bits)}, path)
    return [str(w.dtype) for w in weights]
