"""What generated CUDA code computes, on a CPU: :func:`~thresher.backends.tvm.emulation.kernels.check_kernels`."""
