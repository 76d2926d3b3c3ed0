"""``TVMBackend``: lower a program to compiled code, save it, load it again."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tvm
from torch import Tensor, fx

from thresher.backends.base import DEFAULT, Backend, Executable, KernelTime, LibraryCall, LoweringOptions
from thresher.backends.tvm.codegen.relax_pipeline import build
from thresher.backends.tvm.cpu import missing_features, triple_of
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.importing.provenance import Kernels
from thresher.backends.tvm.importing.uncompiled import uncompiled_nodes
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.plans.tuner import tune
from thresher.backends.tvm.runtime import TVMModule, load_code
from thresher.backends.tvm.target import TVMTarget, resolve_target
from thresher.errors import BackendError, first_line
from thresher.ir.nodes import dtype_of, is_tensor
from thresher.ir.program import Program
from thresher.runtime.format import CODE
from thresher.runtime.weight_store import Weights
from thresher.tuning.options import Tune
from thresher.tuning.records import Record, read_lines

PLANS_VERSION = 3  # of the kernel templates: records of another are for other code
MIN_FREE_BYTES = 32 << 20  # of the disk that code is linked on
SHIPPED_RECORDS = Path(__file__).parent / "plans" / "records.jsonl"


@dataclass(frozen=True)
class LoadedCode:
    """Compiled code from an artifact, and its bytes, to save it again."""

    library: Any
    data: bytes


class TVMExecutable(Executable):
    """Compiled code and its weights."""

    def __init__(
        self,
        code: Any,
        weights: list[np.ndarray],
        device: str,
        cpu: str,
        activations: int | None,
        kernels: Kernels | None = None,
        device_arrays: dict[tuple[int, str], Any] | None = None,
        complex_outputs: Sequence[int] = (),
    ):
        """Hold code that was compiled or loaded.

        Args:
            code: TVM's executable, fresh from the compiler, or :class:`LoadedCode`.
            weights: the packed constants in the order in which the code takes them.
            device: ``cpu`` or ``cuda``.
            cpu: the LLVM name of the (host) CPU that the code is for.
            activations: bytes of the planned buffers for intermediate values; None where they are not known.
            kernels: the kernels in the order in which they run, each with the nodes that it computes.
            device_arrays: the weights that are on a device already (:class:`thresher.runtime.weight_store.Weights`).
            complex_outputs: the indices of the results that are complex.
        """
        self.complex_outputs = complex_outputs
        self.code, self.weights, self.device, self.cpu, self.kernels = code, weights, device, cpu, kernels or []
        self.device_arrays = {} if device_arrays is None else device_arrays
        self.memory = {"weights": sum(w.nbytes for w in weights)}
        if activations is not None:
            self.memory["activations"] = activations
        self._module: TVMModule | None = None

    @property
    def module(self) -> TVMModule:
        """The runnable module; made at the first call, because code for a GPU can be built where there is none.

        Raises:
            BackendError: this machine has no GPU, or its CPU lacks instructions that the code uses.
        """
        if self._module is None:
            if self.device == "cuda" and not tvm.cuda(0).exist:
                raise BackendError(
                    "this module was compiled for CUDA and no CUDA device is here; save it and run it where one is"
                )
            if self.device == "cpu" and (missing := missing_features(self.cpu)):
                raise BackendError(
                    f"this module was compiled for the CPU {self.cpu!r}; this one lacks {', '.join(missing)}: save it and run it where "
                    "they are"
                )
            self._module = TVMModule(self._library, self.weights, self.device, self.device_arrays, self.complex_outputs)
        return self._module

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        return self.module(inputs)

    def profile(self, inputs: Sequence[Any]) -> list[KernelTime]:
        """Time every kernel; on a GPU, where the host does not wait for kernels, none.

        A kernel whose nodes TVM's passes leave unknown has none in the result.
        """
        if self.device != "cpu":
            return []
        waiting = deque(self.kernels)
        times = []
        for name, milliseconds in self.module.profile(inputs, {name for name, _ in self.kernels}):
            while waiting and waiting[0][0] != name:  # a kernel that became a view is no call any more
                waiting.popleft()
            times.append(KernelTime(name, waiting.popleft()[1] if waiting else (), milliseconds))
        return times

    def as_text(self) -> str:
        """Return CUDA C++ for a GPU, LLVM IR for a CPU; empty for code that was loaded: it is machine code."""
        if self.device == "cuda":
            return self.device_code()
        return "" if isinstance(self.code, LoadedCode) else str(_llvm_module(self.code.mod).inspect_source("ll"))

    def device_code(self) -> str:
        """Return the generated device source (CUDA C++) of a module compiled for a GPU."""
        host = (self._library if isinstance(self.code, LoadedCode) else self.code.mod).imports[0]
        return "\n".join(m.inspect_source() for m in host.imports)

    def constants(self) -> Weights:
        constants = Weights()
        constants.add(self.weights)
        return constants

    @property
    def _library(self) -> Any:
        return self.code.library if isinstance(self.code, LoadedCode) else self.code

    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        """Write the code as a shared library.

        Raises:
            BackendError: linking for another architecture needs a compiler that is not installed.
            OSError: the disk is full.
        """
        if isinstance(self.code, LoadedCode):
            (directory / CODE).write_bytes(self.code.data)
        else:
            _check_free_space(directory)
            self.code.export_library(str(directory / CODE), fcompile=_linker(self.cpu))
        return {
            "device": self.device,
            "cpu": self.cpu,
            "activations": self.memory.get("activations"),
            "library": [dataclasses.asdict(call) for call in self.library],
            "complex_outputs": self.complex_outputs,
            "weights": weights.add(self.weights),
        }


def _llvm_module(module: Any) -> Any:
    """Return the module of LLVM code among those that ``module`` imports."""
    return next((m for m in module.imports if m.kind == "llvm"), None) or _llvm_module(module.imports[0])


def detached_weights(weights: Sequence[np.ndarray], program: Program, shared_weights: Weights) -> list[np.ndarray]:
    """Return the weights without views of the program's constants, which may be the user's live parameters: training would change them.

    A view is replaced by the equal array in ``shared_weights``, else by a copy; equal views by one copy. Packed weights are no views.
    """
    live = {t.untyped_storage().data_ptr() for t in program.constants.values()}
    copies: dict[Any, np.ndarray] = {}
    detached = []
    for array in weights:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, Tensor) and base.untyped_storage().data_ptr() in live:
            view = (array.ctypes.data, array.shape, array.strides, array.dtype)
            if view not in copies:
                copies[view] = shared_weights.equal(array)
            array = copies[view]
        detached.append(array)
    return detached


def _check_free_space(directory: Path) -> None:
    """Raise OSError where code may not fit: LLVM ends the process when it cannot write."""
    if (free := shutil.disk_usage(directory).free) < MIN_FREE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)} for code ({free >> 20} of {MIN_FREE_BYTES >> 20} MB)",
            str(directory),
        )


def _linker(cpu: str) -> Any:
    """Return the function that links a shared library for a CPU; None for this machine's compiler."""
    if not (triple := triple_of(cpu)):
        return None
    compiler = f"{triple}-g++"
    if shutil.which(compiler) is None:
        raise BackendError(
            f"saving code for {cpu!r} here needs the compiler {compiler}, which is not found (Debian: g++-{triple.replace('_', '-')})"
        )
    return tvm.support.cc.cross_compiler(compiler)


class NotImplementedByTVM(BackendError):
    """Raised where TVM fails to compile a module that was imported."""


def _lower(program: Program, target: TVMTarget, lowering_options: LoweringOptions) -> TVMExecutable:
    selector = PlanSelector(lowering_options.records, lowering_options.library)
    lowering_options.progress("importing into TVM")
    imported = import_program(program, target, selector, lowering_options)
    weights = detached_weights(imported.weights, program, lowering_options.shared_weights or Weights())
    lowering_options.progress("generating code")
    try:
        built = build(imported.module, target, selector, imported.origins)
    except Exception as error:  # TVM's, of whatever class
        raise NotImplementedByTVM(f"TVM cannot compile the program: {first_line(error)}") from error
    results = [n for n in program.output_nodes if isinstance(n, fx.Node)]
    complex_outputs = [i for i, n in enumerate(results) if is_tensor(n) and dtype_of(n).is_complex]
    executable = TVMExecutable(
        built.executable, weights, target.device, target.cpu, built.activations, built.kernels, None, complex_outputs
    )
    executable.tuned = (len(selector.used_records), len(selector.sites))
    executable.library, executable.rounds_more = imported.library, imported.rounds_more
    return executable


class TVMBackend(Backend):
    """Lowers through TVM: to machine code for CPUs with kernels of our own, to CUDA for GPUs."""

    name: ClassVar[str] = "tvm"
    tunable: ClassVar[bool] = True
    specializes: ClassVar[bool] = True

    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        """Lower for ``cpu`` (this machine's), ``cpu:<llvm name>`` or ``cuda:sm_NN``."""
        resolved = resolve_target(target)
        try:
            return _lower(program, resolved, lowering_options)
        except NotImplementedByTVM as error:
            known = lowering_options.library_nodes
            failed = uncompiled_nodes(program, lambda alone: _lower(alone, resolved, lowering_options), set(known))
            if not failed:
                raise
            if not lowering_options.library:
                name, reason = next(iter(failed.items()))
                raise BackendError(
                    f"cannot lower node {name}: {reason}; with library='auto' torch computes it"
                ) from error
            return _lower(program, resolved, replace(lowering_options, library_nodes={**known, **failed}))

    def runs_here(self, target: str) -> bool:
        resolved = resolve_target(target)
        return super().runs_here(target) and (resolved.device == "cuda" or not missing_features(resolved.cpu))

    def fingerprint(self, target: str) -> str:
        resolved = resolve_target(target)
        machine = resolved.machine
        size = target if machine is None else f"{machine.threads} threads {machine.cache >> 10} KB"
        return f"tvm {version('apache-tvm')} plans {PLANS_VERSION} {resolved.cpu} {size}"

    def shipped(self) -> Sequence[Record]:
        return read_lines(SHIPPED_RECORDS)

    def tune(
        self,
        program: Program,
        target: str,
        options: Tune,
        lowering_options: LoweringOptions,
        save: Callable[[Record], None],
    ) -> int:
        return tune(program, resolve_target(target), self.fingerprint(target), options, lowering_options, save)

    def load(self, code: bytes, manifest: dict[str, Any], weights: Weights) -> Executable:
        if manifest["device"] == "cuda" and tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
            raise BackendError(
                "this artifact was compiled for CUDA, and TVM finds no CUDA driver here; load it where a GPU is"
            )
        executable = TVMExecutable(
            LoadedCode(load_code(code), code), weights.find(manifest["weights"]), manifest["device"], manifest["cpu"],
            manifest.get("activations"), device_arrays=weights.placed, complex_outputs=manifest["complex_outputs"],
        )  # fmt: skip
        executable.library = [LibraryCall(**call) for call in manifest.get("library", [])]
        return executable
