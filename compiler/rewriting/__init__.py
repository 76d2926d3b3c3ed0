"""Passes: their contract, their registry, the manager that holds them to it, and pattern matching."""
