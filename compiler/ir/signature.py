"""What a compiled model takes and returns: names, shapes, dtypes, and the user's nesting. It travels in the artifact as JSON."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export._tree_utils import reorder_kwargs

from thresher.errors import InputError
from thresher.runtime.tensor_spec import LiteralSpec, TensorSpec, check_shape, dtype_name

LEAVES = (Tensor, np.ndarray)
LITERALS = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Signature:
    """``outputs`` holds None for each tensor result, a :class:`LiteralSpec` for each literal one."""

    inputs: tuple[TensorSpec | LiteralSpec, ...]
    outputs: tuple[LiteralSpec | None, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    device: str

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        return flatten_call(self.in_spec, args, kwargs)

    def assemble(self, results: Sequence[Any]) -> Any:
        """The user's structure from the flat tensor results."""
        if self.out_spec.is_leaf():
            return self.with_literals(results)[0]
        return pytree.tree_unflatten(self.with_literals(results), self.out_spec)

    def with_literals(self, results: Sequence[Any]) -> list[Any]:
        """The flat outputs: tensor results with the literal outputs in their places."""
        left = iter(results)
        return [next(left) if spec is None else spec.value for spec in self.outputs]

    def check(self, leaves: Sequence[Any]) -> list[Any]:
        """The tensor leaves, each with the shape, dtype and device that was compiled for; :class:`InputError` names the one that is not."""
        symbols: dict[str, tuple[int, str]] = {}
        tensors = []
        for spec, value in zip(self.inputs, leaves):
            if isinstance(spec, LiteralSpec):
                if value != spec.value:
                    raise InputError(
                        f"argument {spec.name!r} was {spec.value!r} when the model was captured and cannot change to {value!r}"
                    )
            else:
                self._check_type(spec, value)
                check_shape(spec, value, symbols)
                tensors.append(value)
        if len({isinstance(t, np.ndarray) for t in tensors}) > 1:
            raise InputError("the arguments mix torch tensors and NumPy arrays; give one kind")
        return tensors

    def _check_type(self, spec: TensorSpec, value: Any) -> None:
        if not isinstance(value, (Tensor, np.ndarray)):
            raise InputError(f"argument {spec.name!r} must be a tensor, not {type(value).__name__}")
        found = dtype_name(value.dtype)
        if found != spec.dtype:
            raise InputError(
                f"argument {spec.name!r} has dtype {found}, but the model was compiled for {spec.dtype}; convert it first"
            )
        if isinstance(value, Tensor) and value.device.type != self.device:
            raise InputError(
                f"argument {spec.name!r} is on {value.device}, but the model was compiled for {self.device}; "
                f"move it with .to({self.device!r})"
            )

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [
                {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)}
                if isinstance(s, TensorSpec)
                else {"name": s.name, "value": s.value}
                for s in self.inputs
            ],
            "outputs": [None if s is None else {"name": s.name, "value": s.value} for s in self.outputs],
            "in_spec": pytree.treespec_dumps(self.in_spec),
            "out_spec": pytree.treespec_dumps(self.out_spec),
            "device": self.device,
        }

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Signature:
        inputs = tuple(
            TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) if "shape" in s else LiteralSpec(s["name"], s["value"])
            for s in raw["inputs"]
        )
        outputs = tuple(None if s is None else LiteralSpec(s["name"], s["value"]) for s in raw["outputs"])
        return Signature(
            inputs,
            outputs,
            pytree.treespec_loads(raw["in_spec"]),
            pytree.treespec_loads(raw["out_spec"]),
            raw["device"],
        )


@functools.cache
def _flat(count: int) -> pytree.TreeSpec:
    """The structure of a call with so many tensors and nothing else: almost every call, and flattening it takes longer than looking."""
    return pytree.tree_flatten((tuple(range(count)), {}))[1]


def flatten_call(in_spec: pytree.TreeSpec, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The leaves of a call, checked against the structure that was captured."""
    if not kwargs and all(isinstance(a, LEAVES) for a in args) and in_spec == _flat(len(args)):
        return list(args)
    try:
        leaves, spec = pytree.tree_flatten((tuple(args), reorder_kwargs(kwargs, in_spec)))
    except (ValueError, KeyError) as error:
        raise InputError(f"the arguments do not match the captured signature: {error}") from error
    if spec != in_spec:
        raise InputError(
            f"the arguments have the structure {spec}, but the model was captured with {in_spec}; "
            "call it with the same nesting of tuples, lists and dicts"
        )
    return leaves


def dimension(size: int | torch.SymInt) -> int | str:
    """A dimension of a fake tensor as a number or as the name of its symbol."""
    return str(size) if isinstance(size, torch.SymInt) else int(size)
