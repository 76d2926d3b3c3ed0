"""Running an artifact where torch is not: NumPy arrays in, NumPy arrays out. Needs TVM's runtime, NumPy and safetensors.

    import thresher                      # without torch there is only this of it
    model = thresher.load("model.thresher")
    y = model(x)

Where torch is installed ``thresher.load`` gives a :class:`thresher.Compiled`, which takes NumPy arrays, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load as load_arrays

from thresher.artifact.bundle import MAIN, Bundle
from thresher.backends.tvm.runtime import TVMModule, load_code
from thresher.errors import ArtifactError, InputError, ValidationError
from thresher.runtime.batching import BatchSplitter, Run
from thresher.runtime.format import MEMBERS, WEIGHTS, check_fit, code_members, read, reading
from thresher.runtime.pytree import PyTree
from thresher.runtime.tensor_spec import LiteralSpec, TensorSpec, check_shape
from thresher.runtime.weight_store import Weights

TOLERANCE = {"float32": 1e-4, "float64": 1e-9, "float16": 2e-2}  # relative to the output's scale, as when it was built


class Model:
    """A loaded artifact. Takes and returns the nesting of the original model; containers that are not of Python become dictionaries.

    ``inputs`` says what it takes, ``text`` is its graph, ``report`` what was done, as JSON.
    """

    def __init__(self, entry: dict[str, Any], members: Mapping[str, bytes], module: Run):
        signature = entry["signature"]
        self.inputs = tuple(
            TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) if "shape" in s else LiteralSpec(s["name"], s["value"])
            for s in signature["inputs"]
        )
        self.outputs = signature["outputs"]
        self.takes, self.gives = PyTree.read(signature["in_spec"]), PyTree.read(signature["out_spec"])
        self.module, self.text, self.report = module, members["program.txt"].decode(), members["report.json"].decode()
        self._proof = entry["proof"], members["proof.safetensors"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = {key: kwargs[key] for key in (self.takes.parts[1].keys or ()) if key in kwargs}
        if len(named) != len(kwargs):
            raise InputError(f"the model takes no argument {sorted(kwargs.keys() - named.keys())[0]!r}")
        return self.gives.assemble(iter(self._run(list(self.takes.flatten((args, named))))))

    def validate(self) -> float:
        """Prove it here: the worst error, relative to the output's scale, against what the eager model said to the stored inputs.

        Raises :class:`ValidationError` where it is larger than it may be.
        """
        lists, data = self._proof
        tensors = load_arrays(data)
        given, wanted = (
            [tensors[v["tensor"]] if "tensor" in v else v["value"] for v in lists[k]] for k in ("inputs", "outputs")
        )
        worst = 0.0
        for want, found in zip(wanted, self._run(given), strict=True):
            if isinstance(want, np.ndarray):
                error = _error(want.astype(np.float64), found.astype(np.float64))
                if not error <= max(TOLERANCE.get(str(want.dtype), 1e-1), float(lists["steps"])):
                    raise ValidationError(f"compiled = eager, stored probe: error {error:.2e}")
                worst = max(worst, error)
        return worst

    def _run(self, leaves: Sequence[Any]) -> list[Any]:
        results = iter(self.module(self._checked(leaves)))
        return [next(results) if spec is None else spec["value"] for spec in self.outputs]

    def _checked(self, leaves: Sequence[Any]) -> list[np.ndarray]:
        symbols: dict[str, tuple[int, str]] = {}
        arrays = []
        for spec, value in zip(self.inputs, leaves, strict=True):
            if isinstance(spec, LiteralSpec):
                if value != spec.value:
                    raise InputError(
                        f"argument {spec.name!r} was {spec.value!r} when the model was captured and cannot change to {value!r}"
                    )
                continue
            if not isinstance(value, np.ndarray):
                raise InputError(f"argument {spec.name!r} must be a NumPy array, not {type(value).__name__}")
            if str(value.dtype) != spec.dtype:
                raise InputError(
                    f"argument {spec.name!r} has dtype {value.dtype}, but the model was compiled for {spec.dtype}; convert it first"
                )
            check_shape(spec, value, symbols)
            arrays.append(value)
        return arrays


def load(path: str | Path) -> Model | Bundle[Model]:
    """Read an artifact, check it, and make it callable: a model, or a :class:`Bundle` of those that are in it.

    Raises :class:`ArtifactError` saying what does not fit.
    """
    path = Path(path)
    manifest, members = read(path)
    with reading(path):
        check_fit(path, manifest)
        weights = Weights.read(members[WEIGHTS])
        models = {name: _loaded(path, name, e, members, weights) for name, e in manifest["entries"].items()}
    return models[MAIN] if set(models) == {MAIN} else Bundle(models)


def _loaded(path: Path, name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Model:
    lowered, modules = entry["lowered"], []
    for code, part in code_members(lowered).items():
        if entry["backend"] != "tvm" or part.get("library"):
            needs = "is a torch program" if entry["backend"] != "tvm" else "calls torch's own kernels"
            raise ArtifactError(
                f"{path} {needs}: it needs torch. Build it with backend='tvm' and library='never' to run without"
            )
        arrays = weights.find(part["weights"])
        modules.append(TVMModule(load_code(members[f"{name}/{code}"]), arrays, part["device"], weights.placed))
    own = {member: members[f"{name}/{member}"] for member in MEMBERS}
    if "sizes" not in lowered:
        return Model(entry, own, modules[0])
    times = {int(size): float(time) for size, time in lowered["times"].items()}
    return Model(entry, own, BatchSplitter(dict(zip(map(int, lowered["sizes"]), modules)), lowered["batched"], times))


def _error(reference: np.ndarray, found: np.ndarray) -> float:
    if reference.shape != found.shape or not np.array_equal(np.isfinite(reference), np.isfinite(found)):
        return float("inf")
    finite = np.isfinite(reference)
    scale = float(np.abs(reference[finite]).max(initial=0.0))
    error = float(np.abs(reference - found)[finite].max(initial=0.0))
    return error / scale if scale > 0 else error
