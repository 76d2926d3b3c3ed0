"""Describe the attentions of a program, one line for each, for the report."""

from __future__ import annotations

import torch

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.analysis.attention.kinds import find_pooling_mixers, kind_of
from thresher.analysis.attention.sites import attention_sites
from thresher.ir.nodes import module_path
from thresher.ir.program import Program


def describe_attentions(program: Program) -> list[tuple[str, str]]:
    """Return (module, description) of every attention, in the order of the program.

    These are the sites with their kind, attentions of another form with the reason, attentions over lists of blocks, and averages that
    stand in for attention.
    """
    sites, others = attention_sites(program)
    lines = [(s.node, ": ".join(filter(None, (kind_of(program, s), str(s))))) for s in sites]
    lines += [(node, "pooling instead of attention") for node in find_pooling_mixers(program)]
    lines += [(node, f"an attention, and {reason}") for node, reason in others.items()]
    lines += [(node, "over lists of blocks") for node in program.calls(torch.ops.thresher.sparse_attention.default)]
    return [(module_path(node), description) for node, description in sorted(lines, key=lambda line: line[0])]
