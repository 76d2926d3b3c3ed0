"""The sentences with which passes refuse, read from their source, and the test of one of them.

A sentence is a string with a space that is raised with an exception of the passes, returned by a function that returns a reason, assigned
to a ``reason``, or said in a note among refusals. What it fills in is written ``*``.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import thresher.passes
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Pass
from thresher.testing import before_after, refused

PASSES = Path(thresher.passes.__file__).parent
#: Functions whose strings describe rewrites, candidates or reports.
NO_REASONS = {
    "_fold", "_name_causal", "pooling", "balanced",
    "_sparse", "pattern_of", "__str__", "describe", "skip", "drop_no_op", "_the_same_before", "name_each_part",
    "name_relu", "name_kth_largest", "name_linear", "spell_out_prelu", "name_instance_norm", "spell_out_shuffle", "drop_empty_mask",
    "broadcast_late",
}  # fmt: skip
Build = Callable[[], tuple | Program]


def check_refusal(
    item: str | Pass,
    sentence: str,
    build: Build,
    first: tuple[str | Pass, ...] = (),
    context: Callable[[Program], Context] | None = None,
    partly: bool = False,
) -> None:
    """Assert that a pass leaves a model alone and says ``sentence``, in which ``*`` stands for anything.

    ``build`` makes a program, or a module and its inputs. With ``partly`` the pass may rewrite something else in it.
    Raises :class:`AssertionError` with what the pass said instead.
    """
    made = build()
    program = made if isinstance(made, Program) else capture(made[0].eval(), made[1:])
    given = context(program) if context else None
    if not partly:
        refused(item, program, match=pattern(sentence), first=first, context=given)
        return
    messages = [n.message for n in before_after(item, program, first=first, context=given).refusals]
    assert any(re.search(pattern(sentence), m) for m in messages), f"no refusal says {sentence!r}: {messages}"


def pattern(sentence: str) -> str:
    """Return the regular expression of a sentence."""
    return ".*".join(re.escape(part) for part in sentence.split("*"))


@functools.cache
def sentences(path: Path) -> Counter[str]:
    """Return the refusals in a module of the passes, and how often each stands there."""
    return Counter(_text(s) for s in _refusals(ast.parse(path.read_text()), "", _exceptions()))


def listed_refusals(path: Path) -> Counter[str]:
    """Return the sentences that a test file lists under ``REFUSALS``."""
    for node in ast.parse(path.read_text()).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(t, ast.Name) and t.id == "REFUSALS" for t in targets):
            entries = (e for e in node.value.elts if isinstance(e, ast.Tuple))  # type: ignore[union-attr, attr-defined]
            return Counter(e.elts[0].value for e in entries if isinstance(e.elts[0], ast.Constant))  # type: ignore[misc]
    return Counter()


@functools.cache
def _exceptions() -> set[str]:
    """Return the names of the exceptions that passes define: what they carry is a reason."""
    classes = (n for p in PASSES.rglob("*.py") for n in ast.parse(p.read_text()).body if isinstance(n, ast.ClassDef))
    return {c.name for c in classes if any(isinstance(b, ast.Name) and b.id.endswith("Exception") for b in c.bases)}


def _refusals(tree: ast.AST, function: str, exceptions: set[str], within: bool = False) -> Iterator[ast.expr]:
    """Yield the strings that are reasons; ``within`` a statement all of whose strings are."""
    if isinstance(tree, ast.FunctionDef):
        function, within = tree.name, False
        if "refusal" in function:
            yield from (
                s for call in ast.walk(tree) if _notes(call) for s in _refusals(call, function, exceptions, True)
            )
            return
    elif isinstance(tree, ast.Raise) and isinstance(tree.exc, ast.Call):
        within = getattr(tree.exc.func, "id", "") in exceptions
    elif isinstance(tree, ast.Return):
        within = function not in NO_REASONS
    elif isinstance(tree, ast.stmt):
        within = _about_refusals(tree)
    elif isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "PassResult":
        yield from (s for argument in tree.args[2:] for s in _refusals(argument, function, exceptions, True))
        return
    elif isinstance(tree, ast.Call) and getattr(tree.func, "attr", "") == "restore":
        within = True
    if within and re.search(r"[a-z]{2}", _text(tree)) and " " in _text(tree):
        yield tree  # type: ignore[misc]
        return
    for child in ast.iter_child_nodes(tree):
        if not isinstance(child, ast.JoinedStr | ast.Constant) or within:
            yield from _refusals(child, function, exceptions, within)


def _notes(tree: ast.AST) -> bool:
    return isinstance(tree, ast.Call) and ast.unparse(tree.func) in ("Note", "Note.at")


def _about_refusals(statement: ast.stmt) -> bool:
    """Return whether a simple statement names refusals or a reason as what it changes."""
    if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return any("refusal" in ast.unparse(t) or "reason" in ast.unparse(t) for t in targets)
    return isinstance(statement, ast.Expr) and bool(re.match(r"[\w.]*(refusals|blockers)\.", ast.unparse(statement)))


def _text(tree: ast.AST) -> str:
    if isinstance(tree, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "*" for v in tree.values)
    return tree.value if isinstance(tree, ast.Constant) and isinstance(tree.value, str) else ""
