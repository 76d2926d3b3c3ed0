"""Tuning: what is measured is recorded and used, a killed run goes on, and nothing gets slower or wrong by it."""

from __future__ import annotations

import argparse
from functools import partial

import pytest
import torch
import tvm
from torch import Tensor, nn
from tvm.rpc import base
from tvm.runtime.vm import VirtualMachine

import thresher
from helpers.clocks import FakeClock, compile_with
from thresher import Tune
from thresher.analysis.cost.cost import machine_model
from thresher.backends.base import find_backend
from thresher.backends.tvm.plans import runner, tuner
from thresher.backends.tvm.plans.metaschedule import TRACE
from thresher.cli.arguments import remote
from thresher.cli.main import main
from thresher.driver.clock import Clock
from thresher.driver.measure_machine import WORKLOAD
from thresher.errors import BackendError, InputError
from thresher.ir.subprogram import extract_subprogram
from thresher.tuning.options import Remote
from thresher.tuning.records import Record, Records

FAST = Tune(trials=3)


class Net(nn.Module):
    """One kernel of every family that has plans: a product, a filtering, a depthwise layer, a product of computed values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.deep = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.wide(x).relu()).flatten(2)
        return self.head((y @ y.transpose(1, 2)).softmax(-1))


def example() -> tuple[nn.Module, Tensor]:
    return Net().eval(), torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(1))


def model_and_inputs() -> tuple[nn.Module, tuple]:
    """For the command line."""
    model, x = example()
    return model, (x,)


def measured() -> list[Record]:
    """The records of kernels; there is one of the machine, too."""
    return [r for r in Records().all() if r.workload != WORKLOAD]


def quick(monkeypatch) -> None:
    monkeypatch.setattr(Clock, "machine", lambda clock, backend, target: machine_model(target))
    monkeypatch.setattr(tuner, "ROUNDS", 1)
    monkeypatch.setattr(tuner, "FINAL_ROUNDS", 1)
    monkeypatch.setattr(runner, "CALLS", 1)
    monkeypatch.setattr(tuner, "COMPARISON_SECONDS", 0.001)


def test_recorded_used_and_right(monkeypatch) -> None:
    quick(monkeypatch)
    model, x = example()
    compiled = thresher.compile(model, (x,), target="cpu", tune=FAST)
    records = measured()
    assert len(records) == 4 == compiled.report.tuned[1]
    assert all(r.microseconds > 0 and r.microseconds <= r.rule_microseconds for r in records)
    assert {"tuned", "untuned"} <= set(compiled.report.tuning)  # also "tuned, without torch", where torch won
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        example(),
        # rows that end within a register, of one tile and of several, of sums in one go and in slices
        (nn.Linear(1536, 67).eval(), torch.randn(7, 1536)),
        (nn.Sequential(nn.Conv2d(40, 37, 1), nn.ReLU(), nn.Conv2d(37, 19, 5)).eval(), torch.randn(1, 40, 9, 9)),
    ],
    ids=["families", "deep", "odd"],
)
def test_every_plan_of_every_kernel_is_right(model: nn.Module, x: Tensor, monkeypatch) -> None:
    """Each is built and computes what the operator does."""
    seen: list[str] = []

    def compare(self, workload, site):
        alone = extract_subprogram(self.program, [site.subject], tuner.values_of(site), {site.subject})
        (wanted,) = alone.run(*alone.probe)
        candidates = self.candidates(workload, site)
        for plan in candidates.plans[:8]:
            executable, weights = candidates.build(plan)
            main = VirtualMachine(executable, tvm.cpu())["main"]
            (result,) = main(*self.runner.sent(candidates.inputs), *self.runner.sent(weights))
            assert torch.allclose(torch.from_dlpack(result), wanted, atol=1e-4), plan
            seen.append(plan)
        return Record.now(self.fingerprint, workload, candidates.plans[0], 1.0, 1.0)

    quick(monkeypatch)
    monkeypatch.setattr(tuner.Bench, "measure", compare)
    thresher.compile(model, (x,), target="cpu", tune=Tune(), library="never")
    assert len(seen) >= 8 * sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())


def test_a_run_that_was_stopped_goes_on(monkeypatch) -> None:
    quick(monkeypatch)
    model, x = example()
    honest, begun = tuner.Bench.measure, []

    def killed_after_two(self, workload, site):
        if len(begun) == 2:
            raise KeyboardInterrupt
        begun.append(workload)
        return honest(self, workload, site)

    monkeypatch.setattr(tuner.Bench, "measure", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        thresher.compile(model, (x,), target="cpu", tune=FAST)
    assert [r.workload for r in measured()] == sorted(begun)
    monkeypatch.setattr(tuner.Bench, "measure", honest)
    rest: list[str] = []
    monkeypatch.setattr(tuner, "values_of", lambda site, f=tuner.values_of: rest.append(site.subject.name) or f(site))
    thresher.compile(model, (x,), target="cpu", tune=FAST)
    assert len(rest) == 2 and len(measured()) == 4


def test_no_time_no_workloads(monkeypatch) -> None:
    quick(monkeypatch)
    model, x = example()
    thresher.compile(model, (x,), target="cpu", tune=Tune(seconds=0.0))
    assert measured() == []


def test_slower_as_a_whole_is_withdrawn(monkeypatch) -> None:
    quick(monkeypatch)
    model, x = example()
    clock = FakeClock({"untuned": 1.0, "tuned": 1.1})
    compiled = compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=8, min_speedup=0.0))
    assert compiled.report.tuned[0] == 0
    assert [r.plan for r in measured()] == [""] * 4


def test_a_record_cannot_bring_in_a_plan() -> None:
    model, x = example()
    plain = thresher.compile(model, (x,), target="cpu", tune="never")
    fingerprint = find_backend("tvm").fingerprint("cpu")
    workload = "aten.linear.default 2x16x16:float32 24x16:float32* 24:float32*"
    Records().put([Record(fingerprint, workload, "Plan(rows=10**9)", 1.0, 1.0, 1.0)])
    assert torch.equal(thresher.compile(model, (x,), target="cpu")(x), plain(x))


def test_unreadable_records_are_reported_and_left_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("THRESHER_CACHE", str(tmp_path))
    (tmp_path / "records.sqlite").write_bytes(b"garbage" * 1000)
    model, x = example()
    with pytest.warns(UserWarning, match="without the tuning records"):
        thresher.compile(model, (x,), target="cpu")


class Rows(nn.Module):
    """A reduction, which has no plans of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x).amax(1)


def test_a_searched_schedule_is_recorded_used_and_right(monkeypatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(tuner, "turns", lambda calls, rounds: {p: 2.0 - p.startswith(TRACE) for p in calls})
    x = torch.randn(4, 40, 30)
    clock = FakeClock({"untuned": 1.0, "tuned": 0.9})
    compile_with(clock, Rows(), (x,), target="cpu", tune=Tune(trials=2, search=4))
    assert len(measured()) == 1 and measured()[0].plan.startswith(TRACE)
    compiled = thresher.compile(Rows(), (x,), target="cpu")
    assert compiled.report.tuned == (1, 1)
    assert torch.allclose(compiled(x), Rows()(x), atol=1e-6)


def test_on_a_remote_device(monkeypatch) -> None:
    """A tracker and a server in this process: kernels are exported, sent, run and timed there."""
    from tvm import rpc
    from tvm.rpc.tracker import Tracker

    quick(monkeypatch)
    tracker = Tracker("127.0.0.1", port=19190, port_end=19290)
    server = rpc.Server("127.0.0.1", port=19290, port_end=19390, key="board", tracker_addr=("127.0.0.1", tracker.port))
    try:
        model, x = nn.Linear(16, 24).eval(), torch.randn(6, 16)
        device = Remote("127.0.0.1", tracker.port, "board")
        compiled = thresher.compile(model, (x,), target="cpu", tune=Tune(trials=2, remote=device))
        assert len(Records().all()) == 1 and compiled.report.tuning == {}
    finally:
        server.terminate()
        tracker.terminate()


def test_bad_arguments(monkeypatch) -> None:
    with pytest.raises(InputError, match="trials"):
        Tune(trials=1)
    with pytest.raises(InputError, match="not on a remote device"):
        Tune(search=8, remote=Remote("127.0.0.1", 1, "board"))
    with pytest.raises(InputError, match="min_speedup"):
        Tune(min_speedup=1.5)
    with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT:KEY"):
        remote("somewhere")
    model, x = example()
    with pytest.raises(BackendError, match="nothing to tune"):
        thresher.compile(model, (x,), target="cpu", backend="eager", tune=FAST)
    monkeypatch.setattr(base, "connect_with_retry", partial(base.connect_with_retry, timeout=0.1))  # for a minute
    with pytest.raises(BackendError, match="no device 'board'"):
        thresher.compile(model, (x,), target="cpu", tune=Tune(remote=Remote("127.0.0.1", 1, "board")))


def test_command_line(monkeypatch, capsys, tmp_path) -> None:
    quick(monkeypatch)
    spec = f"{__name__}:model_and_inputs"
    assert main(["tune", spec, "--target", "cpu", "--trials", "2"]) == 0
    assert "of 4 workloads" in capsys.readouterr().out
    assert main(["records", "--export", str(tmp_path / "r.jsonl")]) == 0
    assert main(["records", "--records", str(tmp_path / "other.sqlite"), "--merge", str(tmp_path / "r.jsonl")]) == 0
    assert "5 of 5" in capsys.readouterr().out  # four kernels, and the machine
    assert main(["records", "--records", str(tmp_path / "other.sqlite")]) == 0
    assert capsys.readouterr().out.count(" us ") == 5


def test_shipped_records_are_for_this_code() -> None:
    backend = find_backend("tvm")
    found = backend.shipped()
    version = backend.fingerprint("cpu").split(" plans ")[1].split(" ")[0]
    assert found and all(f" plans {version} " in r.target for r in found), (
        "measured with other plans: tune the zoo again"
    )
