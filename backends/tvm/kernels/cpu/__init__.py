"""Kernels for CPUs: one file a family, each with its computation (TE) and its schedule."""
