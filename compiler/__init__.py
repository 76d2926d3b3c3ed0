"""Thresher: a compiler for pruned and sparse PyTorch models."""
import thresher.ops  # noqa: F401
