"""Kernels of our own for the CPU: one file per family, each with its computation (TE) and its schedule."""
