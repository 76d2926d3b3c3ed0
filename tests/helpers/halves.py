"""A pass that exists to be mutated, as the text of its two modules, with its cases."""

from __future__ import annotations

import torch
from torch import nn

from thresher.testing import Case

HELPER = """\
def is_half(value):
    return value == 0.5
"""
PASS = '''\
from dataclasses import dataclass
from typing import ClassVar

import torch

from halves._numbers import is_half
from thresher.authoring import Context, Note, Pass, PassResult, Program, is_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class DropHalves(Pass):
    """Write x * 0.5 * 2 as x."""

    name: ClassVar[str] = "drop-halves"
    limit: int = 8

    def apply(self, program: Program, context: Context) -> PassResult:
        work, notes = program.clone(), []
        for node in list(work.calls(aten.mul.Tensor)):
            inner, factor = node.args
            if is_tensor(factor):
                continue
            if len(notes) < self.limit and inner.target is aten.mul.Tensor and is_half(inner.args[1]) and factor == 2:
                node.replace_all_uses_with(inner.args[0])
                notes.append(Note.at(node, "twice a half"))
        number = 3
        while number < 5:
            number += 1
        return PassResult(work.clean(), notes) if notes else PassResult(program)


def _never(number):
    return number + 1
'''


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * 0.5 * 2)


def build(n: int) -> tuple[nn.Module, tuple]:
    return Halved(), (torch.randn(n, 3),)


CASE = Case("halves", build, n=(1, 2))
CASES = {"drop-halves": [CASE]}
