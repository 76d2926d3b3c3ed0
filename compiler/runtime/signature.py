"""The arguments and results of a compiled model: names, shapes, dtypes, and the user's nesting. It travels in the artifact as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from thresher.errors import InputError
from thresher.runtime.pytree import PyTree
from thresher.runtime.tensor_spec import LiteralSpec, NumberSpec, Symbols, TensorSpec

Output: TypeAlias = LiteralSpec | NumberSpec | None


@dataclass(frozen=True)
class Signature:
    """The signature of a compiled model.

    ``inputs`` and ``outputs`` are flat; ``outputs`` holds None for each tensor result, a :class:`LiteralSpec` for each literal one and a
    :class:`NumberSpec` for each number that code computes, as a tensor of one element.
    ``arguments`` is the tree of ``(args, kwargs)``, ``results`` that of what a call returns. ``device`` is the type of the device (``cpu``
    or ``cuda``) that torch tensors must be on.

    ``state`` names what the model keeps from one call to the next: the last inputs, after the user's. ``writes`` has the index of an input
    for each of the last outputs, after the user's results: it is the new value of that input.
    """

    inputs: tuple[TensorSpec | LiteralSpec, ...]
    outputs: tuple[Output, ...]
    arguments: PyTree
    results: PyTree
    device: str
    state: tuple[str, ...] = ()
    writes: tuple[int, ...] = ()

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the leaves of a call; raise :class:`InputError` where it is nested in another way than the captured one."""
        return self.arguments.flatten_call(args, kwargs)

    def check(self, leaves: Sequence[Any]) -> list[Any]:
        """Return the tensors among ``leaves``, without the literals.

        Raises :class:`InputError` naming the argument with another shape, dtype or device than the model was compiled for.
        """
        if len(leaves) != len(self.inputs):
            raise InputError(f"the model takes {len(self.inputs)} values, not {len(leaves)}")
        symbols: Symbols = {}
        tensors = []
        for spec, value in zip(self.inputs, leaves):
            if isinstance(spec, TensorSpec):
                spec.check(value, self.device, symbols)
                tensors.append(value)
            else:
                spec.check(value)
        if len({isinstance(t, np.ndarray) for t in tensors}) > 1:
            raise InputError("the arguments mix torch tensors and NumPy arrays; give one kind")
        return tensors

    def with_literals(self, results: Sequence[Any]) -> list[Any]:
        """Return the flat outputs: the tensor outputs in order, with the literal ones between them."""
        return _with_literals(self.outputs, results)

    def assemble(self, results: Sequence[Any]) -> Any:
        """Return the user's structure around the flat tensor results, without the values that are written."""
        outputs = self.outputs[: len(self.outputs) - len(self.writes)]
        return self.results.assemble(iter(_with_literals(outputs, results)))

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Return the form in which a manifest holds it. The trees are texts as by ``torch.utils._pytree.treespec_dumps``."""
        return {
            "inputs": [
                {"name": s.name, "dtype": s.dtype, "shape": list(s.shape)}
                if isinstance(s, TensorSpec)
                else {"name": s.name, "value": s.value}
                for s in self.inputs
            ],
            "outputs": [_output_to_json(s) for s in self.outputs],
            "in_spec": self.arguments.dumps(),
            "out_spec": self.results.dumps(),
            "device": self.device,
            "state": list(self.state),
            "writes": list(self.writes),
        }

    @staticmethod
    def from_json(raw: dict[str, Any], read_tree: Callable[[str], PyTree] = PyTree.read) -> Signature:
        """Return the signature of :meth:`to_json`. ``read_tree`` may know more containers than :meth:`PyTree.read`.

        Raises ``ValueError`` where the trees, the state and what is written do not fit the inputs and outputs.
        """
        inputs = tuple(
            TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) if "shape" in s else LiteralSpec(s["name"], s["value"])
            for s in raw["inputs"]
        )
        outputs = tuple(map(_output_from_json, raw["outputs"]))
        arguments, results = read_tree(raw["in_spec"]), read_tree(raw["out_spec"])
        state, writes = tuple(raw["state"]), tuple(raw["writes"])
        if (arguments.leaf_count + len(state), results.leaf_count + len(writes)) != (len(inputs), len(outputs)):
            raise ValueError("the structure has another number of values than the signature")
        if len(set(state)) < len(state) or len(set(writes)) < len(writes):
            raise ValueError("something is kept or written twice")
        if not all(0 <= i < len(inputs) and isinstance(inputs[i], TensorSpec) for i in writes):
            raise ValueError("what is written is no tensor input")
        return Signature(inputs, outputs, arguments, results, raw["device"], state, writes)


def _with_literals(outputs: Sequence[Output], results: Sequence[Any]) -> list[Any]:
    tensors = iter(results)

    def one(spec: Output) -> Any:
        if spec is None:
            return next(tensors)
        return spec.value if isinstance(spec, LiteralSpec) else spec.read(next(tensors))

    return [one(spec) for spec in outputs]


def _output_to_json(spec: Output) -> dict[str, Any] | None:
    if isinstance(spec, NumberSpec):
        return {"number": spec.kind}
    return None if spec is None else {"name": spec.name, "value": spec.value}


def _output_from_json(raw: dict[str, Any] | None) -> Output:
    if raw is not None and "number" in raw:
        return NumberSpec(raw["number"])
    return None if raw is None else LiteralSpec(raw["name"], raw["value"])
