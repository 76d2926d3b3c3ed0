"""The TVM backend: CPU kernels of our own, CUDA through dlight."""

import os
from typing import Any

# TVM pins its workers to cores by default; beside torch's own threads that lets two of them share a core while another idles.
os.environ.setdefault("TVM_BIND_THREADS", "0")
# On x86 TVM takes half of the logical CPUs, supposing hyper-threads; what we may run on is what the schedules are made for.
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))

__all__ = ["TVMBackend"]


def __getattr__(name: str) -> Any:
    """Import the compiler when it is asked for: running a module (``runtime``) needs neither it nor torch."""
    if name == "TVMBackend":
        from thresher.backends.tvm.backend import TVMBackend

        return TVMBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
