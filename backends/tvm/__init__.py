"""The TVM backend: CPU kernels of our own, CUDA through dlight."""

from thresher.backends.tvm.backend import TVMBackend

__all__ = ["TVMBackend"]
