"""Pruned weights: which structure is seen, which layout is taken, and when it stays dense."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import thresher.ops  # noqa: F401  (registers the operators)
from helpers.cases.contexts import skipping
from helpers.clocks import FakeClock, compile_with
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.analysis.cost.break_even import PRUNED_DENSITIES, BreakEven, Layer, estimated
from thresher.analysis.cost.cost import machine_model
from thresher.backends.base import find_backend
from thresher.driver.measure_break_even import measure
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.passes.sparsity.skip_pruned_weights import SkipPrunedWeights, pattern_of, stored
from thresher.passes.specialize.channels_last import ChannelsLast
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager, PassRecord
from thresher.verification.compare import compare

ops = torch.ops.thresher


def blocks(high: int, wide: int, density: float, n: int = 128, k: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n // high, k // wide, generator=generator) < density
    return torch.randn(n, k, generator=generator) * mask.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def some_of(group: int, count: int = 2, n: int = 128, k: int = 96) -> Tensor:
    """Return a weight that keeps the ``count`` largest of each group."""
    weight = torch.randn(n, k // group, group, generator=torch.Generator().manual_seed(0))
    return (weight * (weight.abs() >= weight.abs().topk(count, -1).values[..., -1:])).reshape(n, k)


def layers(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def nearly_two_of_four(empty: int) -> Tensor:
    """Return a weight of a hundred groups with two of four, but for four that have one, and for ``empty`` ones."""
    weight = torch.tensor([1.0, 0.0, 2.0, 0.0]).repeat(10, 10)
    weight[:4, 0] = 0
    weight[9, : 4 * empty] = 0
    return weight


COSTS = {"rows": 2.0, "panels": 1.0, "runs": 1.5}


def by_density(layer: Layer) -> BreakEven:
    """Rows are twice as dear as panels, runs in between."""
    cost = COSTS.get(layer.kind, 9.0)
    return BreakEven(1.0, (0.0, cost), (0.0, 1.0))


def run(weight: Tensor, rows: int = 4) -> tuple[Program, PassRecord, list]:
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(1))
    manager, context = PassManager([SkipPrunedWeights()]), Context(find_break_even=by_density)
    program = manager.run(capture(layers(weight).eval(), (x,)), context)
    return program, manager.records[0], [asdict(z) for z in manager.zeros]


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (blocks(32, 32, 0.2), "blocks of 32 x 32"),
        (blocks(16, 1, 0.1), "blocks of 16 x 1"),
        (blocks(1, 16, 0.1), "blocks of 1 x 16"),
        (blocks(4, 4, 0.3), "blocks of 4 x 4"),
        (blocks(16, 16, 0.2), "blocks of 16 x 16"),
        (blocks(32, 1, 0.1), "blocks of 32 x 1"),
        (blocks(1, 32, 0.1), "blocks of 1 x 32"),
        (blocks(8, 8, 0.3), "blocks of 8 x 8"),
        (blocks(16, 1, 0.1, n=144), "blocks of 16 x 1"),
        (blocks(1, 16, 0.1, k=80), "blocks of 1 x 16"),
        (some_of(4), "2:4"),
        (some_of(8, 4), "4:8"),
        (some_of(16, 5), "5:16"),
        (some_of(4, 3), "scattered"),
        (some_of(5, 2, k=90), "scattered"),
        (blocks(1, 1, 0.1), "scattered"),
        (nearly_two_of_four(0), "2:4"),
        (nearly_two_of_four(2), "scattered"),
    ],
)
def test_patterns_are_seen(weight: Tensor, words: str) -> None:
    assert pattern_of(weight) == words


@pytest.mark.parametrize(
    ("weight", "rows", "layout"),
    [
        (blocks(32, 32, 0.2), 4, "panels"),
        (blocks(32, 1, 0.2), 1, "panels"),
        (blocks(1, 1, 0.1), 4, "rows"),
        (blocks(1, 16, 0.1), 1, "runs"),
        (blocks(1, 16, 0.1), 4, "rows"),
    ],
)
def test_the_fastest_layout_is_taken(weight: Tensor, rows: int, layout: str) -> None:
    program, record, zeros = run(weight, rows)
    (node,) = program.calls(ops.pruned_linear.default)
    assert node.args[3] == layout and f"kept by {layout}" in record.rewrites[0].message
    (line,) = zeros
    kept = stored(weight, rows)[layout]  # type: ignore[index]
    assert line["chosen"] and line["saved"] == pytest.approx(1 - kept)
    assert (line["dense"], line["sparse"]) == pytest.approx((1000.0, 1000 * kept * COSTS.get(layout, 9.0)))
    assert line["nonzero"] == pytest.approx(float((weight != 0).double().mean()))


def test_it_stays_dense_where_that_is_faster() -> None:
    program, record, zeros = run(blocks(1, 1, 0.6))
    assert not list(program.calls(ops.pruned_linear.default)) and "dense is faster" in record.refusals[0].message
    assert [line["chosen"] for line in zeros] == [False]
    assert run(blocks(1, 1, 0.9))[1].refusals == []  # too few zeros to speak of
    assert stored(blocks(1, 16, 0.1), 1)["runs"] == pytest.approx(0.1, abs=0.03)
    edge = torch.arange(40.0).reshape(4, 10) % 10 < 7  # as many as are still kept
    assert stored(edge, 4) == {"rows": PRUNED_DENSITIES[-1], "panels": PRUNED_DENSITIES[-1]}


def test_the_layer_that_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(layer: Layer) -> BreakEven:
        asked.append(layer)
        return by_density(layer)

    x, weight = torch.randn(2, 3, 80), blocks(1, 1, 0.1, k=80)
    for limit in (1 << 30, weight.numel() * 4 + 128 * 4, weight.numel() * 4 + 128 * 4 - 1):
        monkeypatch.setattr("thresher.passes.sparsity.skip_pruned_weights.CACHED_BYTES", limit)
        SkipPrunedWeights().apply(capture(layers(weight).eval(), (x,)), Context(find_break_even=remember))
    assert asked == [Layer("rows", 6, 80, 128, cold) for cold in (False, False, True)]


def test_half_types_and_single_vectors_stay() -> None:
    weight = blocks(1, 1, 0.1)
    for model, x in (
        (layers(weight), torch.randn(96)),
        (layers(weight).to(torch.bfloat16), torch.randn(4, 96, dtype=torch.bfloat16)),
        (layers(weight * torch.inf), torch.randn(4, 96)),
    ):
        program = capture(model.eval(), (x,))
        assert SkipPrunedWeights().apply(program, Context(find_break_even=by_density)).program is program


def test_pruned_by_torch() -> None:
    """torch.nn.utils.prune, end to end; what is stored is what is left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.9)
    x = torch.randn(5, 256)
    compiled = compile_with(FakeClock(break_even=by_density), model, (x,))
    assert not compare([model(x)], [compiled(x)]).exceeds(1e-5)
    assert [line.kind for line in compiled.report.sparsity if line.chosen] == ["weight (scattered)"] * 2
    dense = 4 * 2 * 256 * 256
    assert compiled.report.memory["weights"] < 0.35 * dense


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_one_pixel(stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(96, 128, 1, stride=stride)
    with torch.no_grad():
        conv.weight.copy_(blocks(1, 1, 0.1)[..., None, None])
    model, x = nn.Sequential(conv, nn.ReLU6(), nn.Conv2d(128, 8, 3)), torch.randn(2, 96, 9, 8)
    manager, context = PassManager([ChannelsLast(), SkipPrunedWeights()]), Context(find_break_even=by_density)
    program = manager.run(capture(model.eval(), (x,)), context)
    (node,) = program.calls(ops.pruned_linear.default)
    assert program.constants[node.args[1].target].shape == (128, 96)
    assert len(list(program.calls(torch.ops.aten.slice.Tensor))) == (2 if stride == 2 else 0)
    torch.testing.assert_close(program.run(x)[0], model(x))
    assert [zero.module for zero in manager.zeros] == ["0"]  # the other one is dense
    built = find_backend("tvm").lower(program.rounded(), "cpu")
    assert not compare([model(x)], built.run([x])).exceeds(1e-5)


def test_convolutions_of_more_pixels_or_groups_stay() -> None:
    weights = {
        "padded": nn.Conv2d(8, 8, 1, padding=1),
        "groups": nn.Conv2d(8, 8, 1, groups=2),
        "3 x 3": nn.Conv2d(8, 8, 3),
        "bfloat16": nn.Conv2d(8, 8, 1).to(torch.bfloat16),
    }
    for conv in weights.values():
        with torch.no_grad():
            conv.weight *= torch.rand(conv.weight.shape) < 0.1
        program = capture(conv.eval(), (torch.randn(1, 8, 6, 6, dtype=conv.weight.dtype),))
        manager = PassManager([ChannelsLast(), SkipPrunedWeights()])
        assert not list(manager.run(program, Context(find_break_even=by_density)).calls(ops.pruned_linear.default))


def test_layouts_are_measured() -> None:
    layer = Layer("panels", 4, 128, 128, cold=False)
    found = measure(find_backend("tvm"), "cpu", layer)
    assert found.measured and found.dense > 0
    guess = estimated(Layer("rows", 64, 256, 256, False), machine_model("cpu"))
    assert guess.at(0.1) < guess.dense < guess.at(0.6)


BEFORE = """\
program model {
  %x = input : f32[2, 32]
  %weight = constant "weight" : f32[32, 32]
  %bias = constant "bias" : f32[32]
  %y = aten.linear.default(%x, %weight, %bias) : f32[2, 32]
  return [%y]
}
"""
AFTER = """\
program model {
  %x = input : f32[2, 32]
  %weight = constant "weight" : f32[32, 32]
  %bias = constant "bias" : f32[32]
  %pruned_linear = thresher.pruned_linear.default(%x, %weight, %bias, 'rows') : f32[2, 32]
  return [%pruned_linear]
}
"""


def test_before_and_after() -> None:
    check_rewrite("skip-pruned-weights", BEFORE, AFTER, constants={"weight": torch.eye(32)}, context=skipping)


REFUSALS = [
    (
        "GPUs have no kernel for pruned weights: they stay dense",
        lambda: (layers(blocks(1, 1, 0.1)), torch.randn(4, 96)),
    ),
    (
        "* % of the weight are 0: dense is faster, * ms instead of * ms",
        lambda: (layers(blocks(1, 1, 0.6)), torch.randn(4, 96)),
    ),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    context = Context(target="cuda" if "GPUs" in sentence else "cpu", find_break_even=by_density)
    check_refusal("skip-pruned-weights", sentence, build, context=lambda program: context)
