"""Zeros among activations and weights."""
