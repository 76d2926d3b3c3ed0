"""A pass on real models: one small model of every family of transformers, timm and torchvision, and our reference models.

A case is written for a pass; these models are not. Each is captured once, with random weights of which a part of the output channels is
zero, and goes through the checks of one program. A model that the pass leaves alone is no finding.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from thresher.analysis.cost.cost import count_flops
from thresher.errors import ThresherError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.models.families import LIBRARIES
from thresher.models.families.sample import SampleExcluded
from thresher.rewriting.contract import Pass
from thresher.testing.judge import Finding, Judge
from thresher.testing.trial import Example, prepared
from thresher.testing.zoo import ZOO, settle, zero_channels

#: A module with positional and keyword arguments.
Call = tuple[nn.Module, Sequence[Any], dict[str, Any]]


@dataclass(frozen=True)
class Zoo:
    """Models that a pass is tried on, and how much that may take.

    Attributes:
        names: patterns of names: ``transformers/*bert*``, ``timm/*``, ``torchvision/resnet18``, ``reference/*``.
        seconds: after so many no further model is begun.
        most_parameters: a larger model is left out; so is one with more calls or operations than these:
        most_calls: of operators.
        most_flops: floating-point operations of one run.
        zeros: the part of the output channels of each layer that is zero, as after pruning.
        seed: of the order in which models are tried: the reference models first, the others at random.
    """

    names: Sequence[str] = ("*",)
    seconds: float = 900.0
    most_parameters: int = 20_000_000
    most_calls: int = 2000
    most_flops: float = 4e9
    zeros: float = 0.5
    seed: int = 0

    def models(self) -> tuple[dict[str, Callable[[], Call]], dict[str, str]]:
        """Return builders of the models by name, in the order in which they are tried, and why libraries are left out, by pattern."""
        builders = {f"reference/{name}": _reference(build) for name, build in ZOO.items()}
        left_out: dict[str, str] = {}
        others: dict[str, Callable[[], Call]] = {}
        for library, families in LIBRARIES.items():
            if not any(_may_match(library, pattern) for pattern in self.names):
                continue
            if missing := families.missing():
                left_out[f"{library}/*"] = f"{' and '.join(missing)} not installed"
                continue
            others |= {f"{library}/{name}": _family(families.build, name) for name in families.names()}
        order = sorted(others)
        random.Random(self.seed).shuffle(order)
        builders |= {name: others[name] for name in order}
        return {n: b for n, b in builders.items() if any(fnmatch(n, pattern) for pattern in self.names)}, left_out

    def too_large(self, program: Program) -> str:
        """Return why a model is not tried; empty where it is."""
        counts = (
            (program.parameter_count(), self.most_parameters, "parameters"),
            (sum(1 for _ in program.calls()), self.most_calls, "calls"),
            (count_flops(program), self.most_flops, "floating-point operations"),
        )
        return next((f"more than {limit:,.0f} {what}" for count, limit, what in counts if count > limit), "")


@dataclass
class Survey:
    """The rewrites of a pass on real models, and what is wrong with them.

    Attributes:
        tried: how many rewrites it had on each model that contains its operators, by name.
        without: models without its operators.
        left_out: why a model was not tried, by name, or by pattern for all models of a library.
        findings: what is wrong.
    """

    tried: dict[str, int] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def rewritten(self) -> list[str]:
        """The models on which it rewrote something."""
        return [name for name, count in self.tried.items() if count]

    def __str__(self) -> str:
        lines = [
            f"tried on {len(self.tried)} models, rewrote something on {len(self.rewritten)}; "
            f"{len(self.without)} have none of its operators, {len(self.left_out)} left out"
        ]
        for reason in dict.fromkeys(self.left_out.values()):
            names = [name for name, other in self.left_out.items() if other == reason]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"left out: {shown}: {reason}")
        return "\n".join([*lines, *map(str, self.findings)])


def survey(judge: Judge, first: Sequence[str | Pass], zoo: Zoo) -> Survey:
    """Try a pass on the models of ``zoo``, after the passes ``first``. Raises :class:`ValueError` where no model has a name like these."""
    builders, left_out = zoo.models()
    if not builders and not left_out:
        raise ValueError(f"no model has a name like {', '.join(zoo.names)}; names look like timm/convnext")
    result, start = Survey(left_out=left_out), time.monotonic()
    for name, build in builders.items():
        if time.monotonic() - start > zoo.seconds:
            result.left_out[name] = f"the {zoo.seconds:g} seconds were over"
            continue
        try:
            program = _captured(build, zoo)
        except Exception as error:  # a library may raise anything where it builds one of its models
            result.left_out[name] = _reason(error)
            continue
        if reason := zoo.too_large(program):
            result.left_out[name] = reason
        else:
            _try(judge, Example(name, prepared(program, first, judge.context), {}, program), result)
        del program
        gc.collect()  # graphs are circles, and hold the weights
    return result


def _try(judge: Judge, example: Example, result: Survey) -> None:
    wanted = judge.item.target_ops
    if wanted and not any(True for _ in example.program.calls(*wanted)):
        result.without.append(example.where)
        return
    seen: dict[str, Finding] = {}
    for finding in example.run(judge):
        seen.setdefault(finding.check, finding)
    result.tried[example.where] = len(example.rewrites)
    result.findings += seen.values()


def _captured(build: Callable[[], Call], zoo: Zoo) -> Program:
    torch.manual_seed(0)
    model, args, kwargs = build()
    return capture(zero_channels(model, zoo.zeros), tuple(args), kwargs)


def _reason(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, (ThresherError, SampleExcluded)) else f"{type(error).__name__}: {first}"


def _reference(build: Callable[[], tuple[nn.Module, tuple]]) -> Callable[[], Call]:
    def built() -> Call:
        model, args = build()
        return settle(model), args, {}

    return built


def _family(build: Callable[[str], Any], name: str) -> Callable[[], Call]:
    def built() -> Call:
        case = build(name)
        return case.model, case.inputs.args, case.inputs.kwargs

    return built


def _may_match(library: str, pattern: str) -> bool:
    """Return whether a pattern can fit a model of a library: its names need not be asked for else, which imports the library."""
    return fnmatch(library, pattern.split("/")[0])
