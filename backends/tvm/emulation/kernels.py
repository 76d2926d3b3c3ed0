"""Run generated CUDA kernels where there is no GPU, and compare each with the same kernel before it was scheduled.

Every kernel is compiled for the CPU by ``g++``: its threads are fibers and its matrix instructions emulated (``emulation.h``). That shows
what the code computes, and barriers at which threads would wait for ever; it says nothing of its speed.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tvm
from tvm import tirx

from thresher.backends.tvm.codegen.relax_pipeline import context_of, fuse, schedule
from thresher.backends.tvm.importing.import_program import import_program
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.target import TVMTarget, resolve_target
from thresher.errors import BackendError
from thresher.ir.program import Program

HEADERS = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-w", "-fPIC"]
ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\) \{')
DYNAMIC = re.compile(r"extern __shared__ (__align__\(\d+\)) uchar (\w+)\[\]")
BINDING = re.compile(r'^( *)for .*T\.thread_binding\((?:T\.int64\()?(\d+)\)?, thread="([\w.]+)"')


def check_kernels(program: Program, target: str = "cuda:sm_80") -> dict[str, str]:
    """Return the CUDA code of the kernels that ``program`` becomes, by name, after each has been run and compared.

    Inputs of kernels are random. Kernels that were written as CUDA, and not scheduled, are left out. It needs ``g++``.

    Raises:
        AssertionError: naming the kernel that computes something else, or whose threads wait for ever.
        BackendError: the program cannot be lowered for the target, or the target is no GPU.
    """
    machine = resolve_target(target)
    if machine.device != "cuda":
        raise BackendError(f"check_kernels: {target!r} is no GPU; write cuda:sm_NN (for instance cuda:sm_90)")
    module = import_program(program.rounded(), machine).module
    before, after = functions(fuse(module, machine)), functions(schedule(module, machine, PlanSelector()))
    code = {}
    with tempfile.TemporaryDirectory(prefix="emulated-") as folder:
        for name, function in before.items():
            if "tirx.is_scheduled" not in function.attrs:
                (Path(folder) / name).mkdir()
                code[name] = compare_kernel(name, function, after[name], Path(folder) / name, machine)
    return code


def functions(module: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    """Return the kernels of a module by name."""
    return {g.name_hint: f for g, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}


def compare_kernel(name: str, before: tirx.PrimFunc, after: tirx.PrimFunc, folder: Path, target: TVMTarget) -> str:
    """Run a kernel as it was before it was scheduled and, emulated, afterwards. Returns its code; raises AssertionError if they differ."""
    values = _examples(before)
    tensors = {n: tvm.runtime.tensor(v) for n, v in values.items()}
    wanted = [tensors[p.name] for p in before.params]  # one may be there twice
    host = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    tvm.compile(tvm.IRModule({"main": before.with_attr("global_symbol", "main")}), host)["main"](*wanted)
    code = emulate(after, folder, values, target)
    have, want = list(values.values())[-1].astype(float), wanted[-1].numpy().astype(float)
    unit = 2.0**-10 if values[before.params[-1].name].dtype == np.float16 else 1e-6
    error = float(np.abs(have - want).max())
    if not error <= 4 * unit * max(1.0, np.abs(want).max()):
        raise AssertionError(f"kernel {name}: what it computes on a GPU is off by {error:.3g}")
    return code


def emulate(function: tirx.PrimFunc, folder: Path, values: dict[str, np.ndarray], target: TVMTarget) -> str:
    """Run a scheduled function on ``values`` by the names of its buffers, in place; return its code."""
    with target.tvm, context_of(target):
        module = tvm.compile(tvm.IRModule({"f": function.with_attr("global_symbol", "f")}), target.tvm)
        code = str(module.mod.imports[0].inspect_source())
    text = DYNAMIC.sub(r"\1 static uchar \2[1 << 18]", code)
    text = '#include "emulation.h"\n' + text.replace("__shared__ alignas", "static __align__")
    kernels: dict[str, list[str]] = {}  # their pointers by name
    for (name, parameters), extents in zip(ENTRY.findall(code), _launches(function), strict=True):
        kinds, kernels[name] = re.findall(r"(\w+\*)", parameters), re.findall(r"(\w+?)_ptr(?:_\d+)?\b", parameters)
        casts = ", ".join(f"({kind})pointers[{i}]" for i, kind in enumerate(kinds))
        grid, block = (", ".join(str(extents.get(f"{of}Idx.{x}", 1)) for x in "xyz") for of in ("block", "thread"))
        text += f'extern "C" bool run_{name}(void** pointers) {{\n'
        text += f"  return emulated::launch({{{grid}}}, {{{block}}}, [=] {{ {name}({casts}); }});\n}}\n"
    (folder / "kernel.cpp").write_text(text)
    command: list[str | Path] = [
        "g++",
        *FLAGS,
        "-shared",
        f"-I{_compiled_headers()}",
        "-o",
        folder / "kernel.so",
        folder / "kernel.cpp",
    ]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    between: dict[str, np.ndarray] = {}  # what one kernel leaves for the next
    for name, names in kernels.items():
        arrays = [values[n] if n in values else between.setdefault(n, np.zeros(1 << 20, np.uint8)) for n in names]
        run = library[f"run_{name}"]
        run.restype = ctypes.c_bool
        if not run((ctypes.c_void_p * len(arrays))(*[a.ctypes.data for a in arrays])):
            raise AssertionError(f"{name}: threads wait for ever")
    return code


def _launches(function: tirx.PrimFunc) -> list[dict[str, int]]:
    """Return the extents of blocks and threads, of each kernel that the function becomes: one for every outermost loop."""
    loops = [match for line in function.script().splitlines() if (match := BINDING.match(line))]
    outermost = min(len(match[1]) for match in loops)
    extents: list[dict[str, int]] = []
    for indent, extent, axis in (match.groups() for match in loops):
        if len(indent) == outermost:
            extents.append({})
        extents[-1][axis] = max(int(extent), extents[-1].get(axis, 1))
    return extents


def _examples(function: tirx.PrimFunc) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {p.name: ([int(d) for d in p.ty.shape], str(p.ty.dtype)) for p in function.params}
    return {name: random.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}


@functools.cache
def _compiled_headers() -> Path:
    """Return a folder with the headers, compiled once: they take three times as long as a kernel."""
    folder = tempfile.TemporaryDirectory(prefix="emulation-")
    atexit.register(folder.cleanup)
    shutil.copytree(HEADERS, folder.name, dirs_exist_ok=True)
    header = Path(folder.name) / "emulation.h"
    subprocess.run(["g++", *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return Path(folder.name)
