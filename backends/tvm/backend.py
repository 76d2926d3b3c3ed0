"""``TVMBackend``: lower a program to compiled code, save it, load it again."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tvm
from torch import Tensor

from thresher.backends.base import DEFAULT, Backend, Executable, KernelTime, LoweringOptions
from thresher.backends.tvm.codegen.relax_pipeline import build
from thresher.backends.tvm.cpu import (
    CpuInfo,
    cpu_info,
    cpu_name,
    llvm_target,
    missing_features,
    triple_of,
)
from thresher.backends.tvm.importing.importer import Importer, architecture
from thresher.backends.tvm.importing.provenance import Kernels
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.plans.tuner import tune
from thresher.backends.tvm.runtime import TVMModule, load_code
from thresher.errors import BackendError
from thresher.ir.program import Program
from thresher.runtime.format import CODE
from thresher.runtime.weight_store import Weights
from thresher.tuning.options import Tune
from thresher.tuning.records import Record, read_lines

PLANS_VERSION = 3  # of the kernel templates: records of another are for other code
ROOM = 32 << 20  # bytes for compiled code on the way to its library
SHIPPED = Path(__file__).parent / "plans" / "records.jsonl"


@dataclass(frozen=True)
class Loaded:
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
    ):
        """``code``: fresh from the compiler, or :class:`Loaded`."""
        self.code, self.weights, self.device, self.cpu = code, weights, device, cpu
        self.placed: dict[tuple[int, str], Any] = {}
        self.memory = {"weights": sum(w.nbytes for w in weights)}
        if activations is not None:
            self.memory["activations"] = activations
        self._module: TVMModule | None = None
        self.kernels: Kernels = []

    @property
    def module(self) -> TVMModule:
        """The runnable module; made at the first call, because code for a GPU can be built where there is none."""
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
            self._module = TVMModule(self._library, self.weights, self.device, self.placed)
        return self._module

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        return self.module(inputs)

    def profile(self, inputs: Sequence[Any]) -> list[KernelTime]:
        """Kernels whose nodes TVM's passes leave unknown have none; on a GPU, where the host does not wait for kernels, none is timed."""
        if self.device != "cpu":
            return []
        waiting = deque(self.kernels)
        found = []
        for name, milliseconds in self.module.profile(inputs, {name for name, _ in self.kernels}):
            while waiting and waiting[0][0] != name:  # what became a view is no call any more
                waiting.popleft()
            found.append(KernelTime(name, waiting.popleft()[1] if waiting else (), milliseconds))
        return found

    def as_text(self) -> str:
        """Return CUDA C++ for a GPU, LLVM IR for a CPU; empty for code that was loaded: it is machine code."""
        if self.device == "cuda":
            return self.device_code()
        return "" if isinstance(self.code, Loaded) else str(_llvm_module(self.code.mod).inspect_source("ll"))

    def device_code(self) -> str:
        """The generated device source (CUDA C++) of a module compiled for a GPU."""
        host = (self._library if isinstance(self.code, Loaded) else self.code.mod).imports[0]
        return "\n".join(m.inspect_source() for m in host.imports)

    def constants(self) -> Weights:
        held = Weights()
        held.add(self.weights)
        return held

    @property
    def _library(self) -> Any:
        return self.code.library if isinstance(self.code, Loaded) else self.code

    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        if isinstance(self.code, Loaded):
            (directory / CODE).write_bytes(self.code.data)
        else:
            _check_room(directory)
            self.code.export_library(str(directory / CODE), fcompile=_linker(self.cpu))
        return {
            "device": self.device,
            "cpu": self.cpu,
            "activations": self.memory.get("activations"),
            "library": self.library,
            "weights": weights.add(self.weights),
        }


def _llvm_module(module: Any) -> Any:
    """Return the module of LLVM code among those that ``module`` imports."""
    return next((m for m in module.imports if m.kind == "llvm"), None) or _llvm_module(module.imports[0])


def own_weights(weights: Sequence[np.ndarray], program: Program, shared_weights: Weights) -> list[np.ndarray]:
    """Return the weights without views of the program's constants, which may be the user's live parameters: training would change them.

    A view is replaced by the equal array in ``shared_weights``, else by a copy; equal views by one copy. Packed weights are no views.
    """
    live = {t.untyped_storage().data_ptr() for t in program.constants.values()}
    copies: dict[Any, np.ndarray] = {}
    own = []
    for array in weights:
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, Tensor) and base.untyped_storage().data_ptr() in live:
            view = (array.ctypes.data, array.shape, array.strides, array.dtype)
            if view not in copies:
                copies[view] = shared_weights.equal(array)
            array = copies[view]
        own.append(array)
    return own


def _check_room(directory: Path) -> None:
    """LLVM ends the process where it cannot write."""
    if (free := shutil.disk_usage(directory).free) < ROOM:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for code ({free >> 20} of {ROOM >> 20} MB)", str(directory)
        )


def _linker(cpu: str) -> Any:
    """What makes a shared library for a CPU (None: this machine's compiler)."""
    if not (triple := triple_of(cpu)):
        return None
    compiler = f"{triple}-g++"
    if shutil.which(compiler) is None:
        raise BackendError(
            f"saving code for {cpu!r} here needs the compiler {compiler}, which is not found (Debian: g++-{triple.replace('_', '-')})"
        )
    return tvm.support.cc.cross_compiler(compiler)


class TVMBackend(Backend):
    name: ClassVar[str] = "tvm"
    tunable: ClassVar[bool] = True

    def lower(self, program: Program, target: str, lowering_options: LoweringOptions = DEFAULT) -> Executable:
        """``target``: ``cpu`` (this machine's), ``cpu:<llvm name>`` or ``cuda:sm_NN``."""
        where, machine, cpu = resolve_target(target)
        lowering_options.progress("importing into TVM")
        choices = PlanSelector(lowering_options.records, lowering_options.library)
        importer = Importer(
            program,
            machine,
            lowering_options.strict_rounding,
            choices,
            arch=architecture(where),
            shared_weights=lowering_options.shared_weights,
        )
        module, weights = importer.run()
        weights = own_weights(weights, program, lowering_options.shared_weights or Weights())
        lowering_options.progress("generating code")
        built = build(module, where, machine, choices, importer.builder.origin)
        lowered = TVMExecutable(
            built.executable, weights, "cpu" if machine is not None else "cuda", cpu, built.activations
        )
        lowered.tuned, lowered.library = (len(choices.taken), len(choices.sites)), choices.called
        lowered.kernels = built.kernels
        return lowered

    def runs_here(self, target: str) -> bool:
        _, machine, cpu = resolve_target(target)
        return super().runs_here(target) and (machine is None or not missing_features(cpu))

    def fingerprint(self, target: str) -> str:
        _, machine, cpu = resolve_target(target)
        size = f"{machine.threads} threads {machine.cache >> 10} KB" if machine is not None else target
        return f"tvm {version('apache-tvm')} plans {PLANS_VERSION} {cpu} {size}"

    def shipped(self) -> Sequence[Record]:
        return read_lines(SHIPPED)

    def tune(
        self,
        program: Program,
        target: str,
        options: Tune,
        lowering_options: LoweringOptions,
        save: Callable[[Record], None],
    ) -> int:
        where, machine, _ = resolve_target(target)
        return tune(program, where, machine, self.fingerprint(target), options, lowering_options, save)

    def load(self, code: bytes, manifest: dict[str, Any], weights: Weights) -> Executable:
        if manifest["device"] == "cuda" and tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
            raise BackendError(
                "this artifact was compiled for CUDA, and TVM finds no CUDA driver here; load it where a GPU is"
            )
        arrays = weights.find(manifest["weights"])
        loaded = Loaded(load_code(code), code)
        lowered = TVMExecutable(loaded, arrays, manifest["device"], manifest["cpu"], manifest.get("activations"))
        lowered.library, lowered.placed = manifest.get("library", []), weights.placed
        return lowered


def resolve_target(target: str) -> tuple[tvm.target.Target, CpuInfo | None, str]:
    """The TVM target, the CPU's description (None for a GPU) and the LLVM name of the (host) CPU."""
    kind, _, detail = target.partition(":")
    if kind == "cpu":
        cpu = detail or cpu_name()
        if triple_of(cpu) is None:
            raise BackendError(
                f"unknown CPU in target {target!r}: give the name LLVM has for it, for instance cpu:x86-64-v3 or cpu:neoverse-n1"
            )
        machine = cpu_info(cpu)
        return llvm_target(cpu, **{"num-cores": machine.threads}), machine, cpu
    if kind == "cuda" and re.fullmatch(r"sm_\d+a?", detail):
        host = {"kind": "llvm", "mcpu": "x86-64-v3"}
        device = {
            "kind": "cuda", "arch": detail, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32,
        }  # fmt: skip
        return tvm.target.Target(device, host=host), None, "x86-64-v3"
    raise BackendError(
        f"unknown target {target!r}: 'cpu', 'cpu:<llvm cpu name>' or 'cuda:sm_NN' (for instance cuda:sm_90)"
    )
