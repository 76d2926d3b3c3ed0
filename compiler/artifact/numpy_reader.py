"""Running an artifact where torch is not: NumPy arrays in, NumPy arrays out. Needs TVM's runtime, NumPy and safetensors.

    import thresher                      # without torch there is only this of it
    model = thresher.load("model.thresher")
    y = model(x)

Where torch is installed ``thresher.load`` gives a :class:`thresher.Compiled`, which takes NumPy arrays, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from thresher.artifact.bundle import Bundle
from thresher.artifact.fit import check_fit
from thresher.backends.tvm.runtime import TVMModule, load_code
from thresher.errors import ArtifactError
from thresher.runtime.batching import BatchSplitter, Run
from thresher.runtime.format import MAIN, PROGRAM, REFERENCE_RUN, REPORT, WEIGHTS, code_members, read
from thresher.runtime.package import damage_named
from thresher.runtime.reference_run import ReferenceRun
from thresher.runtime.signature import Signature
from thresher.runtime.state import State, call
from thresher.runtime.weight_store import Weights, load_arrays


class Model:
    """A loaded artifact. Takes and returns the nesting of the original model; containers that are not of Python become dictionaries.

    ``signature`` is what it takes and returns, ``text`` its graph, ``report`` the record of its build as JSON, ``state`` the arrays that it
    keeps from one call to the next. What the model writes into its arguments is in them when a call returns.
    """

    def __init__(self, signature: Signature, run: Run, report: str, text: str, reference_run: ReferenceRun):
        self.signature, self.run, self.report, self.text = signature, run, report, text
        self.reference_run = reference_run
        self.state = State(reference_run.state(signature))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self.signature, self.run, self.state, args, kwargs)

    def validate(self) -> float:
        """Compare the results on the stored inputs with the outputs that the eager model gave when this was built.

        Returns the worst error, relative to the output's scale. Raises :class:`ValidationError` where it is larger than it may be.
        """
        return self.reference_run.check(self.signature, self.run).error


def load(path: str | Path) -> Model | Bundle[Model]:
    """Read an artifact, check it, and make it callable: a model, or a :class:`Bundle` of those that are in it.

    Raises :class:`ArtifactError` saying what does not fit.
    """
    path = Path(path)
    manifest, members = read(path)
    with damage_named(path):
        check_fit(path, manifest)
        weights = Weights.read(members[WEIGHTS])
        models = {name: _load_entry(path, name, e, members, weights) for name, e in manifest["entries"].items()}
    return models[MAIN] if set(models) == {MAIN} else Bundle(models)


def _load_entry(path: Path, name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Model:
    return Model(
        Signature.from_json(entry["signature"]),
        _load_code(path, name, entry, members, weights),
        members[f"{name}/{REPORT}"].decode(),
        members[f"{name}/{PROGRAM}"].decode(),
        ReferenceRun.from_json(entry["reference_run"], _with_complex(load_arrays(members[f"{name}/{REFERENCE_RUN}"]))),
    )


def _with_complex(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays with those put together that are stored as ``.real`` and ``.imag``."""
    names = [name.removesuffix(".real") for name in arrays if name.endswith(".real")]
    for name in names:
        real = arrays[f"{name}.real"]
        arrays[name] = np.empty(real.shape, np.result_type(real.dtype, np.complex64))
        arrays[name].real, arrays[name].imag = real, arrays[f"{name}.imag"]
    return arrays


def _load_code(path: Path, name: str, entry: dict[str, Any], members: dict[str, bytes], weights: Weights) -> Run:
    code, modules = entry["code"], []
    for member, description in code_members(code).items():
        if entry["backend"] != "tvm" or description.get("library"):
            reason = "is a torch program" if entry["backend"] != "tvm" else "calls torch's own kernels"
            raise ArtifactError(
                f"{path} {reason}: it needs torch. Build it with backend='tvm' and library='never' to run without"
            )
        arrays = weights.find(description["weights"])
        library = load_code(members[f"{name}/{member}"])
        modules.append(
            TVMModule(library, arrays, description["device"], weights.placed, description["complex_outputs"])
        )
    if "sizes" not in code:
        return modules[0]
    times = {int(size): float(time) for size, time in code["times"].items()}
    return BatchSplitter(dict(zip(map(int, code["sizes"]), modules)), code["batched"], times)
