"""Torch's own kernels as candidates: taken where they measured faster, named, and never without leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thresher
from helpers.clocks import FakeClock, compile_with
from thresher import Tune
from thresher.backends.tvm.plans import tuner
from thresher.driver import measure_machine
from thresher.tuning.options import TorchKernel
from thresher.tuning.records import Record, Records


class Net(nn.Module):
    """Every kind of operator that torch may compute: with strides and groups, transposed, with None and booleans among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up = nn.Conv2d(3, 16, 3, stride=2, groups=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.grouped, self.qkv = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Linear(16, 48, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.grouped(self.conv(x).relu())
        q, k, v = self.qkv(y.flatten(2).transpose(1, 2)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.up(y), nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True) @ v.transpose(-1, -2)


def prefer(monkeypatch, tuned: float = 1.0, own: float = 2.0) -> FakeClock:
    """Torch's kernels win alone; as a whole, the model takes ``tuned`` with them and ``own`` without, 3 untuned."""
    monkeypatch.setattr(
        tuner, "turns", lambda calls, rounds: {plan: 1.0 if plan == repr(TorchKernel()) else 2.0 for plan in calls}
    )
    return FakeClock({"tuned": tuned, "untuned": 3.0, "tuned, without torch": own})


def plans() -> list[str]:
    return [r.plan for r in Records().all() if r.workload != measure_machine.WORKLOAD]


def test_torch_computes_what_it_wins(monkeypatch, tmp_path) -> None:
    clock = prefer(monkeypatch)
    model, x = Net().eval(), torch.randn(1, 3, 19, 17)
    compiled = compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=2))
    assert len(compiled.report.library) == len(plans()) == compiled.report.tuned[0] == 6
    assert set(plans()) == {repr(TorchKernel())}
    loaded = thresher.load(compiled.save(tmp_path / "m.thresher"))
    assert loaded.executable.library == compiled.executable.library
    assert [call.node for call in loaded.executable.library] == [call.node for call in compiled.report.library]
    with torch.no_grad():
        for found in (compiled(x), loaded(x)):
            for y, expected in zip(found, model(x)):
                assert torch.allclose(y, expected, atol=1e-5)


def test_never_means_never(monkeypatch) -> None:
    """Neither by record nor by tuning; a workload that only torch has won is measured again."""
    clock = prefer(monkeypatch)
    model, x = Net().eval(), torch.randn(1, 3, 19, 17)
    compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=2))
    for tune in ("recorded", Tune(trials=2)):
        compiled = compile_with(
            clock, model, (x,), target="cpu", tune=tune, library="never", validate="off", verify="off"
        )
        assert compiled.report.library == [] and "thresher.library" not in compiled.executable.code.as_text()
    assert plans().count("") == 5  # attention has no other plan


@pytest.mark.parametrize(("tuned", "own", "left"), [(2.5, 2.0, "tuned, without torch"), (4.0, 5.0, "untuned")])
def test_withdrawn_where_the_model_is_slower(tuned: float, own: float, left: str, monkeypatch) -> None:
    clock = prefer(monkeypatch, tuned, own)
    model, x = Net().eval(), torch.randn(1, 3, 19, 17)
    compiled = compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=2))
    assert min(compiled.report.tuning, key=compiled.report.tuning.__getitem__) == left
    assert compiled.report.library == [] and set(plans()) == {""}


def test_of_another_version(monkeypatch) -> None:
    """What another torch won says nothing about this one."""
    clock = prefer(monkeypatch)
    model, x = nn.Linear(16, 24).eval(), torch.randn(6, 16)
    compile_with(clock, model, (x,), target="cpu", tune=Tune(trials=2))
    records = Records()
    records.put([Record.now(r.target, r.workload, "TorchKernel(torch='1.0')", 1, 1) for r in records.all()])
    assert thresher.compile(model, (x,), target="cpu").report.library == []


def test_library_is_one_of_two() -> None:
    with pytest.raises(thresher.ThresherError, match="library must be one of"):
        thresher.compile(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target="cpu", library="always")
