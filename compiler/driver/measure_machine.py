"""Measure what this machine does in a second, with code that the backend itself generates; the numbers go to the tuning records.

Four small programs, in turn: a product that is bound by arithmetic, an elementwise operator on more than the cache holds, a gather of
single elements, and a chain of operators too small to take any time but their launch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from thresher.analysis.cost.cost import MachineModel, machine_model
from thresher.backends.base import Backend
from thresher.frontend.capture import capture
from thresher.tuning.records import Record
from thresher.tuning.timing import interleaved

WORKLOAD = "machine"  # under which the numbers are recorded
ROWS, WIDTH = 512, 768
ELEMENTS = 1 << 24
CHAIN = 64


class _Gather(nn.Module):
    def __init__(self, columns: int):
        super().__init__()
        self.register_buffer("index", torch.randperm(columns, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class _Chain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(CHAIN):
            x = x.softmax(-1)
        return x


def measure(backend: Backend, target: str) -> MachineModel:
    """Return the measured speeds, each per second, in about two seconds. The width of a tile is not measured: it is that of the kernels."""
    wide = torch.randn(ELEMENTS >> 10, 1 << 10)
    programs = {
        "product": (nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(ROWS, WIDTH)),
        "stream": (nn.ReLU(), wide),
        "gather": (_Gather(wide.shape[1]), wide),
        "chain": (_Chain(), torch.randn(4, 16)),
    }
    calls = {}
    for name, (module, x) in programs.items():
        calls[name] = partial(backend.lower(capture(module.eval(), (x,)).rounded(), target).run, [x])
    times = {name: timing.median / 1e3 for name, timing in interleaved(calls, rounds=5).items()}
    return dataclasses.replace(
        machine_model(target),
        flops=2 * ROWS * WIDTH * WIDTH / times["product"],
        bandwidth=2 * 4 * ELEMENTS / times["stream"],
        gathered=4 * ELEMENTS / times["gather"],
        launch=times["chain"] / CHAIN,
    )


def record(machine: MachineModel, fingerprint: str) -> Record:
    """Return the measured numbers as a record for the machine ``fingerprint``."""
    return Record.now(
        fingerprint, WORKLOAD, json.dumps(dataclasses.asdict(machine)), 1e6 * machine.launch, 1e6 * machine.launch
    )


def recorded(plans: Mapping[str, str], target: str) -> MachineModel:
    """Return the numbers on record, else typical ones for ``target``: also where the record cannot be read."""
    try:
        numbers = json.loads(plans[WORKLOAD])
        flops, bandwidth, gathered, launch = (float(numbers[k]) for k in ("flops", "bandwidth", "gathered", "launch"))
        if min(flops, bandwidth, gathered, launch) <= 0:
            return machine_model(target)
        return dataclasses.replace(
            machine_model(target), flops=flops, bandwidth=bandwidth, gathered=gathered, launch=launch
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return machine_model(target)
