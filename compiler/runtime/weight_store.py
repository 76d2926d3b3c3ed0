"""Weights by their content: what several models of one artifact share is stored once and held once.

Needs neither torch nor TVM. The file is safetensors; an array's name is the hash of its dtype, its shape and its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save_file

Stored = list[dict[str, str]]  # name and dtype of each weight, as a manifest has them


class Weights:
    """``placed`` is for a backend: what it made of an array for a device, by the array's identity and the device."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.placed: dict[tuple[int, str], Any] = {}

    def add(self, arrays: Sequence[np.ndarray]) -> Stored:
        """Take these in; returns what finds them again."""
        return [{"name": self._name(a), "dtype": str(a.dtype)} for a in arrays]

    def _name(self, array: np.ndarray) -> str:
        name, bits = _named(array)
        self.arrays.setdefault(name, bits)
        return name

    def has(self, array: np.ndarray) -> bool:
        return _named(array)[0] in self.arrays

    def find(self, stored: Stored) -> list[np.ndarray]:
        """The arrays in this order; those of one name are one object."""
        return [self._typed(s["name"], s["dtype"]) for s in stored]

    def _typed(self, name: str, dtype: str) -> np.ndarray:
        if dtype == "bfloat16" and str(self.arrays[name].dtype) != dtype:
            import ml_dtypes

            self.arrays[name] = self.arrays[name].view(ml_dtypes.bfloat16)
        return self.arrays[name]

    def save(self, path: Path) -> None:
        save_file(self.arrays, path)

    @staticmethod
    def read(data: bytes) -> Weights:
        """What :meth:`save` wrote."""
        weights = Weights()
        weights.arrays = load(data)
        return weights


def _named(array: np.ndarray) -> tuple[str, np.ndarray]:
    array = np.ascontiguousarray(array)
    bits = array.view(np.uint16) if str(array.dtype) == "bfloat16" else array  # safetensors' NumPy has no bfloat16
    seen = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    seen.update(bits.reshape(-1).view(np.uint8).data)
    return seen.hexdigest()[:32], bits
