"""Mutants of our passes that nothing can notice, with the reason: for every program they do what the pass does.

A mutant is the file, and the lines before and after; line numbers change too often. ``thresher prove --mutate`` lists those that survive.
"""

from __future__ import annotations

REASONS: dict[tuple[str, str, str], str] = {}
