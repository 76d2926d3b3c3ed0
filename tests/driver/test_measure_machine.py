"""The cost model: measured once, recorded, used by the passes, and honest about what it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thresher
from helpers.clocks import FakeClock, compile_with
from thresher import Tune, capture
from thresher.analysis.cost.cost import MACHINES, MachineModel, machine_model, seconds, seconds_of
from thresher.backends.base import find_backend
from thresher.driver import measure_machine
from thresher.rewriting.contract import Context
from thresher.tuning.records import Records

SLOW = MachineModel(1e9, 1e9, 1e8, 1e-3, 16)


def test_measured_numbers_are_of_this_machine() -> None:
    found = measure_machine.measure(find_backend("tvm"), "cpu")
    assert 1e9 < found.flops < 1e13
    assert 1e8 < found.gathered <= 2 * found.bandwidth < 1e12
    assert 1e-8 < found.launch < 1e-2  # other processes can make it a hundred times what it is
    assert found.width == MACHINES["cpu"].width


def test_measured_once_and_used() -> None:
    backend, clock = find_backend("tvm"), FakeClock(machine=SLOW)
    model, x = nn.Linear(8, 8).eval(), torch.randn(4, 8)
    for _ in range(2):
        report = compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=2)).report
    assert clock.asked == ["machine"]
    assert report.estimate > 1.0  # a launch of SLOW
    plans = Records().plans(backend.fingerprint("cpu"))
    assert measure_machine.recorded(plans, "cpu") == SLOW
    assert thresher.compile(model, (x,), target="cpu").report.estimate == report.estimate
    assert thresher.compile(model, (x,), target="cpu", tune="never").report.estimate < 1.0


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"flops": 1}', '{"width": "x"}', '{"flops": -1}'])
def test_damaged_numbers_are_not_used(text: str) -> None:
    assert measure_machine.recorded({measure_machine.WORKLOAD: text}, "cpu") == machine_model("cpu")


def test_passes_see_the_machine() -> None:
    assert Context().machine == MACHINES["cpu"]
    assert Context("cuda:sm_90").machine == MACHINES["cuda"]
    assert Context(machine=SLOW).machine == SLOW


def test_estimate_by_shape() -> None:
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Flatten(0), nn.Softmax(-1)).eval()
    program = capture(model, (torch.randn(50, 100),))
    times = {n.target: seconds_of(n, SLOW) for n in program.calls()}
    aten = torch.ops.aten
    assert times[aten.linear.default] == pytest.approx(2 * 50 * 100 * 200 / SLOW.flops + SLOW.launch)
    assert times[aten.relu.default] == 0.0  # part of the product's kernel
    assert times[aten.softmax.int] == pytest.approx(2 * 4 * 10_000 / SLOW.bandwidth + SLOW.launch)
    assert seconds(program, SLOW) == pytest.approx(sum(times.values()))
