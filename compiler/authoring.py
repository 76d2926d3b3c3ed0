"""The names that a pass is written with, from one import (docs/authoring.md). What a pass asks of a program is in :mod:`thresher.analysis`.

    from thresher.authoring import Context, Note, Pass, PassResult, Program, matches, register_pass

A pass is proven with :mod:`thresher.testing`. :func:`define` makes a new operator, and :func:`register_rule` gives it a transfer rule.
"""

from thresher.analysis.cost.cost import flops_of, seconds_of
from thresher.analysis.slices.facts import known, sizes
from thresher.analysis.slices.operators import register_rule
from thresher.analysis.slices.ties import equal
from thresher.analysis.slices.transfer.base import TransferRule, argument, evaluate
from thresher.approximation.calibration import watch
from thresher.approximation.search import Candidate
from thresher.ir.lineage import Restore
from thresher.ir.nodes import dtype_of, getitem_users, is_tensor, module_path, shape_of, source_line
from thresher.ir.program import Program, Role
from thresher.ops.define import define
from thresher.rewriting.approximate_pass import ApproximatePass
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.manager import PassManager
from thresher.rewriting.pattern import Match, match_at, matches
from thresher.rewriting.registry import make_pass, register_pass, registered_passes

__all__ = [
    "ApproximatePass",
    "Candidate",
    "Context",
    "Match",
    "Note",
    "Pass",
    "PassManager",
    "PassResult",
    "Program",
    "Restore",
    "Role",
    "TransferRule",
    "argument",
    "define",
    "dtype_of",
    "equal",
    "evaluate",
    "flops_of",
    "getitem_users",
    "is_tensor",
    "known",
    "make_pass",
    "match_at",
    "matches",
    "module_path",
    "register_pass",
    "register_rule",
    "registered_passes",
    "seconds_of",
    "shape_of",
    "sizes",
    "source_line",
    "watch",
]
