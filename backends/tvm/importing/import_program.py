"""Import a program with the converters of this backend: the one place that brings the importer and the table together."""

from __future__ import annotations

from thresher.backends.base import DEFAULT, LoweringOptions
from thresher.backends.tvm.importing.converters import converter_of
from thresher.backends.tvm.importing.importer import Imported, Importer
from thresher.backends.tvm.plans.plan_selection import PlanSelector
from thresher.backends.tvm.target import TVMTarget
from thresher.ir.program import Program


def import_program(
    program: Program,
    target: TVMTarget,
    selector: PlanSelector | None = None,
    options: LoweringOptions = DEFAULT,
    separate_weights: bool = False,
) -> Imported:
    """Convert a program into a Relax module for ``target``; the arguments and the errors are those of :class:`Importer`.

    Without a ``selector`` every kernel gets the plan that is estimated to be the fastest.
    """
    selector = PlanSelector() if selector is None else selector
    return Importer(program, converter_of, target, selector, options, separate_weights).run()
