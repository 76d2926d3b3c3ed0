"""Target strings and what the backend knows of the machine that each one names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import tvm

from thresher.backends.tvm.cpu import CpuInfo, cpu_info, cpu_name, llvm_target, triple_of
from thresher.errors import BackendError

CUDA_HOST = "x86-64-v3"  # the CPU that launches the kernels of a GPU, by its LLVM name


@dataclass(frozen=True)
class TVMTarget:
    """A machine to generate code for: TVM's target, the LLVM name of the (host) CPU and, for a CPU target, its description."""

    tvm: tvm.target.Target
    cpu: str
    machine: CpuInfo | None  # None for a GPU: TVM's rules and ours for GPUs schedule its kernels

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cuda" if self.machine is None else "cpu"

    @property
    def arch(self) -> int:
        """The compute capability of a GPU times ten (80 for sm_80), 0 for a CPU."""
        return int(re.sub(r"\D", "", str(self.tvm.attrs.get("arch", "0"))))

    @property
    def cpu_info(self) -> CpuInfo:
        """The description of the CPU that kernels are made for; only CPU targets have one."""
        assert self.machine is not None, "CPU kernels are chosen for CPU targets only"
        return self.machine


def resolve_target(target: str) -> TVMTarget:
    """Return the machine that a target string names: ``cpu`` (this one), ``cpu:<llvm name>`` or ``cuda:sm_NN``.

    Raises:
        BackendError: LLVM knows no such CPU, or the string has another form.
    """
    kind, _, detail = target.partition(":")
    if kind == "cpu":
        cpu = detail or cpu_name()
        if triple_of(cpu) is None:
            raise BackendError(
                f"unknown CPU in target {target!r}: give the name LLVM has for it, for instance cpu:x86-64-v3 or cpu:neoverse-n1"
            )
        machine = cpu_info(cpu)
        return TVMTarget(llvm_target(cpu, **{"num-cores": machine.threads}), cpu, machine)
    if kind == "cuda" and re.fullmatch(r"sm_\d+a?", detail):
        host = {"kind": "llvm", "mcpu": CUDA_HOST}
        device = {
            "kind": "cuda", "arch": detail, "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32,
        }  # fmt: skip
        return TVMTarget(tvm.target.Target(device, host=host), CUDA_HOST, None)
    raise BackendError(
        f"unknown target {target!r}: 'cpu', 'cpu:<llvm cpu name>' or 'cuda:sm_NN' (for instance cuda:sm_90)"
    )
