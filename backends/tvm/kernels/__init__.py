"""Kernels of our own, by the kind of target, and what they share."""
