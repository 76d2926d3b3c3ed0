"""NVIDIA's run-time compiler, which needs no GPU: CUDA source -> machine code, and what ptxas says about every kernel."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

FLAGS = ("--std=c++17", "--use_fast_math", "-default-device", "--ptxas-options=-v", "-w")


@dataclass(frozen=True)
class Kernel:
    """Registers per thread, bytes spilled per thread, bytes of static shared memory, and the threads of a block."""

    name: str
    registers: int
    spilled: int
    shared: int
    threads: int


def kernels(source: str, arch: str) -> list[Kernel]:
    """Translate and describe; a failed translation raises with the compiler's words."""
    log = _translated(source, arch)
    threads = {name: int(n) for n, name in re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", source)}
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]
        numbers = [
            re.search(p, part) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes smem")
        ]
        registers, spilled, shared = (int(m.group(1)) if m else 0 for m in numbers)
        found.append(Kernel(name, registers, spilled, shared, threads[name]))
    return found


def _translated(source: str, arch: str) -> str:
    spec = find_spec("nvidia.cu13")
    assert spec is not None and spec.submodule_search_locations, "pip install thresher[nvrtc]"
    home = Path(next(iter(spec.submodule_search_locations)))
    ctypes.CDLL(str(home / "lib" / "libnvrtc-builtins.so.13.0"), ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(home / "lib" / "libnvrtc.so.13"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    include = home / "include"
    flags = [f"--gpu-architecture={arch}", *FLAGS, f"-I{include}", f"-I{include / 'cccl'}"]
    failed = nvrtc.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*[f.encode() for f in flags])
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()
