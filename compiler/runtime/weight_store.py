"""Weights by their content: what several models of one artifact share is stored once and held once.

The file is safetensors; an array's name is the hash of its dtype, its shape and its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

Stored = list[dict[str, str]]  # name and dtype of each weight, as a manifest has them
DTYPES = {  # of safetensors; its own NumPy reader has no bfloat16
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
}  # fmt: skip


class Weights:
    """A set of arrays by their content.

    ``placed`` is for a backend: its form of an array on a device, by the array's identity and the device.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.placed: dict[tuple[int, str], Any] = {}

    def add(self, arrays: Sequence[np.ndarray]) -> Stored:
        """Add arrays and return what :meth:`find` needs to give them back."""
        return [{"name": self._add(a), "dtype": str(a.dtype)} for a in arrays]

    def _add(self, array: np.ndarray) -> str:
        name, bits = _named(array)
        self.arrays.setdefault(name, bits)
        return name

    def has(self, array: np.ndarray) -> bool:
        """Return True if an array of this dtype, shape and content is in the set."""
        return _named(array)[0] in self.arrays

    def equal(self, array: np.ndarray) -> np.ndarray:
        """Return the array of this dtype, shape and content that is in the set, else a copy of ``array``."""
        name = _named(array)[0] if self.arrays else ""
        return self._typed(name, str(array.dtype)) if name in self.arrays else array.copy()

    def find(self, stored: Stored) -> list[np.ndarray]:
        """Return the arrays in this order; those of one name are one object."""
        return [self._typed(s["name"], s["dtype"]) for s in stored]

    def _typed(self, name: str, dtype: str) -> np.ndarray:
        if dtype == "bfloat16" and str(self.arrays[name].dtype) != dtype:
            self.arrays[name] = as_bfloat16(self.arrays[name])
        return self.arrays[name]

    def save(self, path: Path) -> None:
        """Write the arrays to a safetensors file."""
        save_file(self.arrays, path)

    @staticmethod
    def read(data: bytes) -> Weights:
        """Return the weights of a file by :meth:`save`."""
        weights = Weights()
        weights.arrays = load_arrays(data)
        return weights


def load_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file; bfloat16 ones have the dtype of ``ml_dtypes``."""
    arrays = {}
    for name, tensor in deserialize(data):
        array = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        arrays[name] = as_bfloat16(array) if tensor["dtype"] == "BF16" else array
    return arrays


def as_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return the numbers of 16 bits each as bfloat16, without a copy."""
    import ml_dtypes  # comes with TVM

    return bits.view(ml_dtypes.bfloat16)


def _named(array: np.ndarray) -> tuple[str, np.ndarray]:
    """Return the name of an array, and the array as safetensors takes it."""
    array = np.ascontiguousarray(array)
    bits = array.view(np.uint16) if str(array.dtype) == "bfloat16" else array  # safetensors' NumPy has no bfloat16
    hashed = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    hashed.update(bits.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()[:32], bits
