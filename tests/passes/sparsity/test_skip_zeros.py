"""Linear layers that meet zeros: which are found, when they skip, and that nothing changes."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
import thresher.ops
from helpers.cases.contexts import skipping
from helpers.clocks import FakeClock, compile_with
from helpers.modules import Function
from helpers.rewrites import check_rewrite
from thresher.analysis.cost.break_even import BreakEven, Layer, estimated, record, recorded
from thresher.analysis.cost.cost import machine_model
from thresher.approximation.calibration import Calibration
from thresher.backends.base import find_backend
from thresher.driver.measure_break_even import measure
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.passes.sparsity._densities import densities, listed, sites_of
from thresher.passes.sparsity.skip_zeros import SkipZeros
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.verification.compare import compare

ops = torch.ops.thresher


class FFN(nn.Module):
    """relu(x U) D, or relu(x G) * (x U) D, most of it closed by its bias."""

    def __init__(self, gated: bool, closed: float = -2.5):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)
        self.gate = nn.Linear(32, 256) if gated else None
        with torch.no_grad():
            (self.gate or self.up).weight *= 3
            (self.gate or self.up).bias += closed

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu() if self.gate is None else self.gate(x).relu() * self.up(x)
        return self.down(hidden)


def free(layer: Layer, overhead: float = 0.0) -> BreakEven:
    """Skipping takes what is left."""
    return BreakEven(1.0, (0.01 + overhead, 1.0 + overhead), (0.01, 1.0))


def skipped(model: nn.Module, x: Tensor, break_even=free) -> tuple[Program, list, list]:
    """The program, what was rewritten, and what was found."""
    program = PassManager(pipelines.exact).run(capture(model.eval(), (x,)))
    manager, context = PassManager([SkipZeros()]), Context(find_break_even=break_even)
    return manager.run(program, context), manager.records[0].rewrites, [asdict(z) for z in manager.zeros]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [1, 6, 30])
def test_relu_layers_skip_their_zeros(rows: int) -> None:
    model, x = FFN(False), rand(rows, 32)
    program, notes, zeros = skipped(model, x)
    assert [n.target for n in program.calls()].count(ops.sparse_linear.default) == 1 and len(notes) == 1
    (line,) = zeros
    hidden = model.up(x).relu()
    assert line["nonzero"] == pytest.approx(float((hidden != 0).double().mean())) and line["module"] == "down"
    assert line["saved"] == pytest.approx(1 - listed(hidden)) and line["chosen"]
    compiled = thresher.compile(model, (x,))
    assert not compare([model(x)], [compiled(x)]).exceeds(1e-5)


def test_gates_close_layers() -> None:
    model, x = FFN(True), rand(3, 32)
    program, _, zeros = skipped(model, x)
    targets = [n.target for n in program.calls()]
    assert targets.count(ops.gated_linear.default) == targets.count(ops.sparse_linear.default) == 1
    assert {line["kind"] for line in zeros} == {"gate", "input"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, layer: layer(F.hardshrink(x, 2.0)),
        lambda x, layer: layer(x * (x.abs() >= x.abs().topk(4, -1).values[..., -1:])),
        lambda x, layer: layer(F.relu(x - 1.0).square()),
        lambda x, layer: layer(torch.where(x > 1.5, x, 0.0).reshape(2, 2, 32)),
    ],
)
def test_whatever_makes_zeros(function) -> None:
    _, notes, _ = skipped(Function(function, nn.Linear(32, 8)), rand(4, 32))
    assert len(notes) == 1 and "are not 0" in notes[0].message


def test_when_it_stays_dense() -> None:
    x = rand(4, 32)
    assert not skipped(FFN(False, closed=4.0), x)[1]  # nearly nothing is 0
    _, notes, zeros = skipped(FFN(False), x, partial(free, overhead=1.0))  # skipping is slow
    assert not notes and [line["chosen"] for line in zeros] == [False]  # and the report says so
    model = FFN(False)
    with torch.no_grad():
        model.down.weight[0, 0] = math.inf  # 0 times infinity is no 0
    assert not skipped(model, x)[1]


def test_tiles_share_a_list() -> None:
    x = torch.zeros(14, 10)
    x[0, 0] = x[6, 1] = x[7, 2] = x[13, 2] = 1
    assert listed(x) == pytest.approx((0.2 + 0.1) / 2) and listed(x[:8]) == pytest.approx(0.3)
    program = capture(Function(lambda x, layer: layer(x), nn.Linear(10, 3)), (x,))
    (density,) = densities(program, sites_of(program), [[x], [x * 0]]).values()
    assert listed(torch.eye(8)) == 1.0 and listed(torch.eye(9)) == pytest.approx(
        (7 + 2) / 18
    )  # eight rows are no tiles
    assert density.nonzero == pytest.approx(4 / 140 / 2) and density.listed == pytest.approx(0.075)


def test_break_even_points_are_measured_and_remembered() -> None:
    layer = Layer("input", 1, 512, 256, cold=False)
    found = measure(find_backend("tvm"), "cpu", layer)
    assert found.measured and len(found.sparse) == len(found.densities) and min(found.dense, *found.sparse) > 0
    made = record(layer, found, "here")
    assert recorded(layer, {made.workload: made.plan}) == found
    assert recorded(layer, {made.workload: "{}"}) is None and recorded(layer, {}) is None
    assert measure(find_backend("tvm"), "cpu", Layer("gate", 2, 64, 64, cold=True)).measured


def test_between_what_was_measured() -> None:
    times = BreakEven(2.0, (0.5, 1.5, 4.5), (0.0, 0.5, 1.0))
    assert times.at(0.25) == pytest.approx(1.0) and times.at(0.75) == pytest.approx(3.0) and times.at(1.0) == 4.5
    assert times.density == pytest.approx(0.54, abs=0.011) and times.worthwhile(0.5) and not times.worthwhile(0.56)
    guess = estimated(Layer("input", 1, 1024, 1024, True), machine_model("cpu"))
    assert guess.at(0.1) < guess.dense < guess.at(1.0) and not guess.measured
    assert estimated(Layer("gate", 64, 64, 64, True), machine_model("cpu")).density <= 0.01


def found(function, *shapes: tuple[int, ...], context: Context | None = None, dtype=torch.float32) -> tuple[list, list]:
    """Return the operators of zeros that are skipped, and what the report says of each site, of a function of inputs and two layers."""
    torch.manual_seed(0)
    model = Function(function, nn.Linear(16, 8), nn.Linear(16, 8)).to(dtype).eval()
    program = capture(model, tuple(torch.randn(shape).to(dtype) for shape in shapes))
    result = SkipZeros().apply(program, context or Context(find_break_even=free))
    kernels = [n.target for n in result.program.calls(ops.sparse_linear.default, ops.gated_linear.default)]
    return kernels, [(line.kind, line.chosen) for line in result.zeros]


def gated(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    gate = b(x).relu()
    return a(x) * gate


def test_what_is_a_gate() -> None:
    assert found(gated, (1, 16)) == ([ops.gated_linear.default], [("gate", True)])
    assert found(lambda x, a, b: b(x).relu() * a(x), (1, 16))[0] == [ops.gated_linear.default]
    assert found(lambda x, a, b: a(x) * b(x).relu(), (1, 16))[0] == []  # the gate is computed later
    assert found(lambda x, a, b: a(x) * 2.0, (1, 16))[0] == []
    square = capture(Function(lambda x, a: (lambda y: y * y)(a(x)), nn.Linear(4, 4)), (rand(1, 4),))
    assert [site.kind for site in sites_of(square)] == ["input"]
    assert found(lambda x, a, b: b(x)[:, :1].relu() * a(x), (1, 16))[0] == []  # of another shape
    assert found(lambda x, a, b: b(x).relu() + a(x), (1, 16))[0] == []
    assert found(lambda x, a, b: (lambda g, y: g * y + y)(b(x).relu(), a(x)), (1, 16))[0] == []  # read twice


def test_of_a_layer_with_zeros_on_both_sides_those_that_save_more() -> None:
    def both(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return b(x).hardshrink(1.0) * a((x - 0.2).relu())

    def prefers(kind: str) -> Context:
        return Context(
            find_break_even=lambda layer: BreakEven(2.0 if layer.kind == kind else 1.0, (0.01, 0.5), (0.01, 1.0))
        )

    assert found(both, (1, 16), context=prefers("input"))[0] == [ops.sparse_linear.default]
    assert found(both, (1, 16), context=prefers("gate"))[0] == [ops.gated_linear.default]
    assert found(both, (1, 16), context=prefers("gate"))[1] == [("gate", True), ("input", False)]
    program = capture(Function(gated, nn.Linear(16, 8), nn.Linear(16, 8)).eval(), (rand(1, 16),))
    (note,) = SkipZeros().apply(program, Context(find_break_even=free)).rewrites
    assert note.message.startswith("zeros of what its output is multiplied with are skipped: ")


def test_gpus_skip_zeros_of_the_inputs_of_few_rows() -> None:
    cuda = Context(target="cuda", find_break_even=free)
    assert found(gated, (3, 16), context=cuda) == ([], [])
    relu = lambda x, a, b: a((x - 2).relu())  # noqa: E731
    assert found(relu, (8, 16), context=cuda)[0] == [ops.sparse_linear.default]
    assert found(relu, (9, 16), context=cuda)[0] == []
    assert found(relu, (8, 16), context=cuda, dtype=torch.bfloat16)[0] == [ops.sparse_linear.default]
    assert found(relu, (8, 16), dtype=torch.bfloat16)[0] == []
    assert found(relu, (16,))[0] == []


def test_zeros_are_counted_on_the_samples() -> None:
    """The example has none; at most eight samples are looked at."""
    model = Function(lambda x, a: a(x.relu()), nn.Linear(16, 8)).eval()
    program = capture(model, (torch.ones(2, 16),))
    assert SkipZeros().apply(program, Context(find_break_even=free)).program is program
    samples = [(torch.full((2, 16), -1.0 if i < 10 else 1.0),) for i in range(36)]
    calibration = Calibration.of(program, samples, thresher.Budget(rel_l2=0.1))
    firsts = [float(s[0].mean()) for s in calibration.search_samples[:8]]
    result = SkipZeros().apply(program, Context(find_break_even=free, calibration=calibration))
    assert result.zeros[0].nonzero == pytest.approx(sum(f > 0 for f in firsts) / 8)


def test_the_layer_that_is_timed_and_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(layer: Layer) -> BreakEven:
        asked.append(layer)
        return BreakEven(2.0, (0.01, 1.0), (0.01, 1.0))

    x = torch.ones(2, 3, 16)
    x[..., :4] = -1.0
    program = capture(Function(lambda x, a: a(x.relu()), nn.Linear(16, 8)).eval(), (x,))
    for limit in (4 * (16 * 8 + 8), 4 * (16 * 8 + 8) - 1):
        monkeypatch.setattr("thresher.passes.sparsity.skip_zeros.CACHED_BYTES", limit)
        result = SkipZeros().apply(program, Context(find_break_even=remember))
    assert asked == [Layer("input", 6, 16, 8, cold) for cold in (False, True)]
    assert [n.message for n in result.rewrites] == [
        "zeros of its input are skipped: 75.0 % are not 0, 25 % of the arithmetic is left out, 750.000 ms instead of 2000.000 ms (measured)"
    ]
    (line,) = result.zeros
    assert (line.nonzero, line.saved, line.dense, line.sparse) == pytest.approx((0.75, 0.25, 2000.0, 750.0))


def test_builds_measure_once() -> None:
    clock = FakeClock(break_even=free)
    model, x = FFN(False), rand(2, 32)
    compiled = compile_with(clock, model, (x,))
    again = compile_with(clock, model, (x,))
    assert clock.asked == ["skip zeros 2/input/2x256x32/hot"]
    assert compiled.report.sparsity == again.report.sparsity and compiled.report.sparsity[0].chosen
    assert "not 0" in str(compiled.report) and "down" in compiled.report.to_html()


BEFORE = """\
program model {
  %x = input : f32[2, 32]
  %weight = constant "weight" : f32[8, 32]
  %hidden = aten.relu.default(%x) : f32[2, 32]
  %y = aten.linear.default(%hidden, %weight, None) : f32[2, 8]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 32]
  %weight = constant "weight" : f32[8, 32]
  %hidden = aten.relu.default(%x) : f32[2, 32]
  %sparse_linear = thresher.sparse_linear.default(%hidden, %weight, None) : f32[2, 8]
  return [%sparse_linear]
}
"""


def test_before_and_after() -> None:
    check_rewrite("skip-zeros", BEFORE, AFTER, context=skipping)
