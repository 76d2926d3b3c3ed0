"""Rows of an embedding that are equal are stored once, and rows that no token asks for not at all.

    table[tokens]  ->  small_table[row[tokens]]        row: for every token the row that holds its values

A pruned vocabulary (rows set to zero, or to the row of the unknown token) leaves equal rows: exact, nothing to be declared. With ``tokens``
the caller promises that no others occur; the rows of all others go. (Vocabulary trimming: Abdaoui et al., SustaiNLP 2020.)

The table must be a constant. Refused: a dynamic shape of the tokens, and a table that something else reads or that is tied to another
weight. It stays, too, where fewer than ``min_removed`` of its rows would go. Raises ``PassError`` for ``tokens`` that are no rows
of the table or that do not name all tokens of the example, and where no embedding reads the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, fx

from thresher.errors import PassError
from thresher.ir.lineage import Restore
from thresher.ir.nodes import shape_of
from thresher.ir.program import Program, Role
from thresher.passes.fold.merge_duplicates import equal_rows
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.registry import register_pass

aten = torch.ops.aten


@register_pass
@dataclass(frozen=True)
class FoldVocabulary(Pass):
    """Store equal rows of an embedding once; with ``tokens``, only the rows that occur."""

    name: ClassVar[str] = "fold-vocabulary"
    target_ops: ClassVar[tuple] = (aten.embedding.default,)
    tokens: Sequence[int] | str | None = None  # the only ones that occur: numbers, or a file with one number a line
    input: str = ""  # the input that holds the tokens; default: the one that reads the longest table
    min_removed: float = 0.1  # at least this fraction of the rows must go: looking ``row`` up costs, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tokens, Sequence) and not isinstance(self.tokens, str):
            object.__setattr__(self, "tokens", tuple(self.tokens))
        self.require(_names_tokens(self.tokens), "tokens", "numbers from 0 on, or a file with one number a line")
        self.require(0 <= self.min_removed <= 1, "min_removed", "a fraction of the rows, from 0 to 1")

    def apply(self, program: Program, context: Context) -> PassResult:
        work, result = program.clone(), PassResult(program)
        limited = self.limited(work)
        for node in list(work.calls(aten.embedding.default)):
            table = work.constant(node.args[0])
            if table is None:
                continue
            held = _held(work, node.args[0])
            if any(isinstance(d, torch.SymInt) for d in shape_of(node.args[1])):
                result.refusals.append(Note.at(node, "rows kept: the shape of the tokens is dynamic"))
                continue
            row = _rows(table, self.occurring(len(table)) if node in limited else None)
            kept = row.unique()
            if len(kept) > (1 - self.min_removed) * len(table):
                continue
            if held:
                result.refusals.append(Note.at(node, f"{len(table) - len(kept)} rows kept: held by {held}"))
                continue
            _shorten(work, node, table, kept, torch.searchsorted(kept, row))
            result.rewrites.append(Note.at(node, f"rows {len(table)} -> {len(kept)}"))
        if result.rewrites:
            result.program = work.clean()
        return result

    def limited(self, program: Program) -> list[fx.Node]:
        """Return the embeddings that ``tokens`` limits: those of the named input, or of the one that reads the longest table."""
        if self.tokens is None:
            return []
        by_input: dict[fx.Node, list[fx.Node]] = {}
        for node in program.calls(aten.embedding.default):
            if node.args[1].op == "placeholder":
                by_input.setdefault(node.args[1], []).append(node)
        if self.input:
            by_input = {n: calls for n, calls in by_input.items() if n.name == self.input}
        if not by_input:
            what = f"input {self.input!r}" if self.input else "input"
            raise PassError(f"fold-vocabulary: no embedding reads an {what}")
        chosen = max(by_input, key=lambda n: max(shape_of(call.args[0])[0] for call in by_input[n]))
        example = program.probe[program.placeholders.index(chosen)]
        rows = min(shape_of(call.args[0])[0] for call in by_input[chosen])
        missing = sorted(set(example.reshape(-1).tolist()) - set(self.occurring(rows)))
        if missing:
            raise PassError(
                f"fold-vocabulary: the example's {chosen.name} holds {missing[:5]}, which tokens does not name"
            )
        return by_input[chosen]

    def occurring(self, rows: int) -> list[int]:
        """Return ``tokens`` as ascending numbers; raises :class:`PassError` where one of them has no row."""
        tokens = self.tokens
        if isinstance(tokens, str):
            try:
                tokens = [int(line) for line in Path(tokens).read_text().split()]
            except (OSError, ValueError) as error:
                raise PassError(f"fold-vocabulary: cannot read the tokens in {self.tokens}: {error}") from error
        numbers = sorted({int(t) for t in tokens or ()})
        if not numbers or numbers[0] < 0 or numbers[-1] >= rows:
            raise PassError(f"fold-vocabulary: tokens must be numbers from 0 to {rows - 1}, at least one")
        return numbers


def _names_tokens(tokens: object) -> bool:
    numbers = isinstance(tokens, tuple) and len(tokens) > 0 and all(isinstance(t, int) and t >= 0 for t in tokens)
    return tokens is None or isinstance(tokens, str) or numbers


def _held(program: Program, table: fx.Node) -> str:
    """Return the names of what else reads the table or is tied to it."""
    value = program.constants[str(table.target)]
    readers = [user.name for user in table.users if user.target is not aten.embedding.default]
    tied = [str(name) for name, other in program.constants.items() if other is value and name != table.target]
    return ", ".join(readers + tied)


def _rows(table: Tensor, tokens: list[int] | None) -> Tensor:
    """Return for every token the first row with its values; for one that does not occur, that of the first that does."""
    row = equal_rows(table, None)
    zero = (table == 0).all(1).nonzero().reshape(-1)
    row[zero] = zero[:1]
    if tokens is not None:
        occurs = torch.zeros(len(table), dtype=torch.bool).index_fill_(0, torch.tensor(tokens), True)
        row = torch.where(occurs, row, row[tokens[0]])
    return row


def _shorten(program: Program, node: fx.Node, table: Tensor, kept: Tensor, index: Tensor) -> None:
    old, tokens = node.args[:2]
    name = str(old.target)
    short = program.add_constant(table[kept], name, old.meta["val"].dtype, like=old)
    indices = program.add_constant(index, f"{name}_place", like=old, role=Role.BUFFER)
    flat = program.insert_call(node, aten.reshape.default, (tokens, [-1]), like=node)
    looked_up = program.insert_call(node, aten.index_select.default, (indices, 0, flat), like=node)
    shaped = program.insert_call(node, aten.reshape.default, (looked_up, list(shape_of(tokens))), like=node)
    rows = program.insert_call(node, aten.embedding.default, (short, shaped), like=node)
    node.replace_all_uses_with(rows)
    short_name = str(short.target)
    program.lineage.append(Restore((short_name,), lambda values: {name: values[short_name][index]}))
