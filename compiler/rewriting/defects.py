"""Defects of a pass in the words of its author: what it returned instead of a result, and the line of it that raised."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

from thresher.errors import ProgramError
from thresher.ir.program import Program
from thresher.rewriting.contract import Note, Pass, PassResult


def check_result(item: Pass, result: Any) -> PassResult:
    """Return what a pass returned. Raises :class:`ProgramError`, with the cure, where it is no result."""
    if not isinstance(result, PassResult):
        cure = "return PassResult(work.clean(), [Note.at(node, 'what was done')]), or PassResult(program) where nothing was"
        raise ProgramError(f"pass {item.name!r} returned {_described(result)}; {cure}")
    if not isinstance(result.program, Program):
        raise ProgramError(
            f"the result of pass {item.name!r} has {_described(result.program)} in the place of its program"
        )
    for title, notes in (("rewrites", result.rewrites), ("refusals", result.refusals)):
        if not isinstance(notes, (list, tuple)):
            raise ProgramError(f"the {title} of pass {item.name!r} are {_described(notes)}; they are a list of notes")
        for note in notes:
            if not isinstance(note, Note):
                raise ProgramError(
                    f"among the {title} of pass {item.name!r} is {note!r}; write Note.at(node, {str(note)!r})"
                )
    return result


def describe(item: Pass, error: Exception) -> str:
    """Return an exception as a line: its class, its message, and the last line of the pass's own file that it went through."""
    file = inspect.getsourcefile(type(item))
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" ({file}:{lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _described(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
