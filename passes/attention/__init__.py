"""Attention: what masks leave out is skipped, and cheaper variants stand in under a budget."""
