"""Changes of a source text that a test of it must notice: the operators of mutation testing (DeMillo, Lipton and Sayward, 1978).

    a < b       ->  a <= b            one comparison is its neighbour, or its contrary
    a and b     ->  True and b        one condition is left out; so is ``not``, and the condition of an ``if`` holds always or never
    n + 2       ->  n - 2,  n + 3     another operator, another number, the other truth value
    continue    ->  pass              a call whose value nobody reads, an early end of a function or of a round of a loop
    f(x, y=1)   ->  f(x)              an argument that has a default

Strings stay as they are, so messages and docstrings do; so do notes, the origin of a new node (``like=``), annotations, decorators, imports
and assertions. mutmut and cosmic-ray have no conditions that hold always and no deleted statements, and write their mutants into files;
hence this module.
"""

from __future__ import annotations

import ast
import bisect
import builtins
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"), ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
CONTRARY = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"), ast.BitOr: ("|", "&"), ast.BitAnd: ("&", "|"),
}  # fmt: skip
#: Displays and strings, for which the other operator is no operator at all.
NO_NUMBERS = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.JoinedStr)
UNTOUCHED = (ast.Import, ast.ImportFrom, ast.Assert, ast.JoinedStr)


@dataclass(frozen=True)
class SourceEdit:
    """One change of a text.

    Attributes:
        line: number of the line in which the change begins.
        function: dotted name of the function that is changed; empty outside of functions.
        reached: numbers of the lines of the statement; none where it runs when the module is imported.
        before, after: the piece that is changed, and what stands in its place; empty where it is left out.
        old_line, new_line: the whole lines with that piece, without the white space around them.
        start, end, new: the bytes that are replaced, and by what.
    """

    line: int
    function: str
    reached: range
    before: str
    after: str
    old_line: str
    new_line: str
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        """Return the text of the module after the change."""
        data = text.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()

    def __str__(self) -> str:
        change = f"became `{self.after}`" if self.after else "was left out"
        return f"line {self.line}: `{self.before}` {change}"


def source_edits(text: str, namespace: Mapping[str, Any]) -> list[SourceEdit]:
    """Return all changes of the text of a module, in the order of the lines.

    ``namespace`` has the values of its names: by them the arguments are known that have a default.
    """
    finder = _Finder(text, namespace)
    finder.visit(ast.parse(text))
    edits = dict.fromkeys(finder.edits)
    return sorted(edits, key=lambda edit: edit.line)


class _Finder(ast.NodeVisitor):
    """Walks through a module and keeps the function and the statement that it is in."""

    def __init__(self, text: str, namespace: Mapping[str, Any]):
        self.text = text.encode()
        self.starts = [0, *itertools.accumulate(len(line) for line in self.text.splitlines(keepends=True))]
        self.namespace = namespace
        self.edits: list[SourceEdit] = []
        self.functions: list[str] = []
        self.within = 0  # functions around, without classes
        self.reached = range(0)

    # ------------------------------------------------------------------ where one is

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, UNTOUCHED):
            return
        if isinstance(node, ast.stmt) and self.within:
            header = getattr(node, "test", None) or getattr(node, "iter", None) or getattr(node, "subject", None)
            last = header if header is not None else node if not hasattr(node, "body") else None
            self.reached = range(node.lineno, (last.end_lineno or node.lineno) + 1 if last else node.lineno + 1)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.functions.append(node.name)
        self.within += 1
        self._visit_block(node.body, last=True)
        self.within -= 1
        self.functions.pop()
        if not self.within:
            self.reached = range(0)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.functions.append(node.name)
        self._visit_block(node.body)
        self.functions.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def _visit_block(self, body: Sequence[ast.stmt], last: bool = False, alone: bool = False) -> None:
        """Visit statements. ``last``: what ends the function here does so anyway; ``alone``: as one block under a condition."""
        for index, statement in enumerate(body):
            self.visit(statement)
            final = last and index == len(body) - 1
            single = alone and len(body) == 1  # the condition that never holds leaves it out, too
            if self._may_go(statement, final) and self.within and not single:
                self._replace(statement, "pass")

    def _may_go(self, statement: ast.stmt, final: bool) -> bool:
        if isinstance(statement, ast.Expr):
            return isinstance(statement.value, ast.Call)
        return isinstance(statement, ast.Continue | ast.Break | ast.Raise | ast.Return) and not final

    # ------------------------------------------------------------------ statements

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        self._condition(node.test)
        self._visit_block(node.body, alone=not node.orelse)
        self._visit_block(node.orelse)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test, ("False",))
        self._visit_block(node.body)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._visit_block(node.body)
        self._visit_block(node.orelse)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
        self._visit_block(node.body)

    def visit_Try(self, node: ast.Try) -> None:
        for block in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
            self._visit_block(block)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC and not isinstance(node.value, NO_NUMBERS):
            old, new = ARITHMETIC[type(node.op)]
            self._operator(node.target, node.value, re.escape(old) + "=", f"{new}=")
        self.visit(node.value)

    # ------------------------------------------------------------------ expressions

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.visit(node.iter)
        for condition in node.ifs:
            self._condition(condition)

    def _condition(self, node: ast.expr, truths: Sequence[str] = ("True", "False")) -> None:
        """Let a condition be constant; its contrary would be noticed wherever one of these is."""
        for truth in truths:
            self._replace(node, truth)
        if isinstance(node, ast.UnaryOp):
            self.visit(node.operand)
        elif isinstance(node, ast.Compare):
            self._compare(node, {op: pair for op, pair in COMPARISONS.items() if op not in CONTRARY})
        else:
            self.visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        self._compare(node, COMPARISONS)

    def _compare(self, node: ast.Compare, table: Mapping[Any, tuple[str, str]]) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, node.comparators):
            if type(operator) in table:
                self._operator(left, right, *table[type(operator)])
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new, neutral = ("and", "or", "True") if isinstance(node.op, ast.And) else ("or", "and", "False")
        self._operator(node.values[0], node.values[1], old, new)
        for value in node.values:
            self._condition(value, (neutral,))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        negative = isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant)
        if isinstance(node.op, ast.Not) or negative:
            self._edit(self._start(node), self._start(node) + (1 if negative else len("not ")), "")
        self.visit(node.operand)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        texts = any(isinstance(side, ast.Constant) and isinstance(side.value, str) for side in (node.left, node.right))
        displays = isinstance(node.left, NO_NUMBERS) or isinstance(node.right, NO_NUMBERS)
        if type(node.op) in ARITHMETIC and not texts and not displays:
            old, new = ARITHMETIC[type(node.op)]
            self._operator(node.left, node.right, re.escape(old), new)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value))
        elif isinstance(value, int):
            self._replace(node, str(value + 1))
            self._replace(node, str(value - 1) if value else "-1")
        elif isinstance(value, float):
            self._replace(node, repr(value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in ("Note", "Note.at"):
            return
        arguments = [*node.args, *node.keywords]
        for argument in _optional(node, self.namespace):
            index = arguments.index(argument)
            start = self._end(arguments[index - 1]) if index else self._start(argument)
            end = self._start(arguments[1]) if not index and len(arguments) > 1 else self._end(argument)
            self._edit(start, end, "", self._start(argument))
        self.generic_visit(node)

    # ------------------------------------------------------------------ texts

    def _replace(self, node: ast.AST, new: str) -> None:
        self._edit(self._start(node), self._end(node), new)

    def _operator(self, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
        """Replace the operator between two operands, which are perhaps in parentheses."""
        start, end = self._end(left), self._start(right)
        word = rf"\b{old}\b" if old[0].isalpha() else old
        match = re.search(word.encode(), self.text[start:end])
        if match is not None:
            self._edit(start + match.start(), start + match.end(), new)

    def _edit(self, start: int, end: int, new: str, shown: int | None = None) -> None:
        """Note a change of some bytes; ``shown``: where the piece begins that a reader sees as left out."""
        shown = start if shown is None else shown
        head = self.text[:start].rpartition(b"\n")[2]
        tail = self.text[end:].partition(b"\n")[0]
        edit = SourceEdit(
            line=bisect.bisect(self.starts, shown),
            function=".".join(self.functions),
            reached=self.reached if self.within else range(0),
            before=_joined(self.text[shown:end]),
            after=new,
            old_line=_joined(head + self.text[start:end] + tail),
            new_line=_joined(head + new.encode() + tail),
            start=start,
            end=end,
            new=new,
        )
        self.edits.append(edit)

    def _start(self, node: Any) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def _end(self, node: Any) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset


def _joined(text: bytes) -> str:
    return " ".join(text.decode().split())


# ---------------------------------------------------------------------- arguments with a default


def _optional(call: ast.Call, namespace: Mapping[str, Any]) -> Iterator[ast.expr | ast.keyword]:
    """Yield the arguments of a call that may be left out: those by name that have a default, and the last one by position."""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return
    callee, bound = _callee(call.func, namespace)
    if getattr(callee, "__module__", None) == "builtins":  # list(x) is a conversion
        return
    try:
        parameters = list(inspect.signature(callee).parameters.values())[bound:] if callee is not None else []
    except (TypeError, ValueError):  # it is written in C
        return
    defaults = {p.name for p in parameters if p.default is not p.empty}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    last = len(call.args) - 1
    if 0 <= last < len(positional) and positional[last].name in defaults:
        yield call.args[last]
    yield from (keyword for keyword in call.keywords if keyword.arg in defaults - {"like"})


def _callee(function: ast.expr, namespace: Mapping[str, Any]) -> tuple[Any, int]:
    """Return what is called, as far as the names tell, and how many of its parameters are bound."""
    if isinstance(function, ast.Name):
        return namespace.get(function.id, getattr(builtins, function.id, None)), 0
    if not isinstance(function, ast.Attribute):
        return None, 0
    owner, _ = _callee(function.value, namespace)
    if isinstance(owner, (ModuleType, type)):
        return getattr(owner, function.attr, None), 0
    classes = (value for value in namespace.values() if isinstance(value, type))  # of an object: some class has it
    methods = (inspect.getattr_static(cls, function.attr, None) for cls in classes)
    return next((m for m in methods if inspect.isfunction(m)), None), 1
