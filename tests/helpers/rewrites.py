"""One rewrite as two texts: the program before a pass, and the one that must come out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from torch import Tensor

from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Pass
from thresher.rewriting.registry import make_pass
from thresher.verification.compare import EXACT_TOLERANCE, compare_programs, observe


def check_rewrite(
    item: str | Pass,
    before: str,
    after: str,
    constants: Mapping[str, Tensor] | None = None,
    context: Callable[[Program], Context] | None = None,
) -> Program:
    """Assert that a pass makes ``after`` of ``before``, names aside, and return the result.

    Args:
        item: the pass, or ``name{option=value}``.
        before: a program as text (:meth:`Program.text`); its constants and inputs are random.
        after: the program that must come out; its numbers are not looked at. That of an exact pass must compute in float64 what the one
            before does.
        constants: numbers of constants of ``before`` on which the pass decides, by name.
        context: makes what the pass may look at; default: an empty one.

    Raises :class:`AssertionError` with the difference of the two texts.
    """
    program, chosen = parse(before), make_pass(item)
    for name, value in (constants or {}).items():
        assert program.constants[name].shape == value.shape, f"the constant {name!r} has another shape"
        program.constants[name] = value.to(program.constants[name].dtype)
    program.verify()
    result = chosen.apply(program, context(program) if context else Context()).program.verify()
    wanted = parse(after)
    if not result.structurally_equal(wanted):
        pair = (p.text(canonical=True).splitlines() for p in (wanted, result))
        difference = "\n".join(difflib.unified_diff(*pair, "wanted", str(chosen), lineterm="", n=99))
        raise AssertionError(f"{chosen} gives another program:\n{result.text()}\n\n{difference}")
    if chosen.kind == "exact":
        divergence = compare_programs(observe(program), result)
        assert not divergence.exceeds(EXACT_TOLERANCE), f"relative error {divergence.relative:.1e} in float64"
    return result
