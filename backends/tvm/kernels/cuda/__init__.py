"""Kernels and schedules for NVIDIA GPUs."""
