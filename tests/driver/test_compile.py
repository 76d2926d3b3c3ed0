"""compile(): options, validation that catches wrong code, threads, the report."""

from __future__ import annotations

import json
import threading
import zipfile

import pytest
import torch
from torch import Tensor, nn

import thresher
from helpers.clocks import FakeClock, compile_with
from thresher.backends.tvm import TVMBackend
from thresher.backends.tvm.importing.converters.registry import CPU_KERNELS
from thresher.errors import BackendError, PassError, ThresherError, ValidationError
from thresher.passes import pipelines
from thresher.report.report import Report
from thresher.testing import ZOO, settle

X = torch.randn(3, 4)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)).eval()


@pytest.fixture
def wrong_gelu(monkeypatch):
    """A kernel with a defect, as a miscompiled operator would be."""
    right = CPU_KERNELS[torch.ops.aten.gelu.default]

    def wrong(importer, node):
        from tvm import relax

        return importer.emit(relax.op.multiply(right(importer, node), relax.const(1.01, "float32")))

    monkeypatch.setitem(CPU_KERNELS, torch.ops.aten.gelu.default, wrong)


def test_a_miscompiled_operator_is_caught_and_named(wrong_gelu) -> None:
    with pytest.raises(ValidationError, match=r"compiled = rewritten.*\n(.*\n)*.*gelu \(aten.gelu.default, module 1\)"):
        thresher.compile(mlp(), (X,), target="cpu", library="never")


def test_validate_warn_and_off(wrong_gelu) -> None:
    with pytest.warns(UserWarning, match="validation failed"):
        thresher.compile(mlp(), (X,), target="cpu", validate="warn", library="never")
    assert thresher.compile(mlp(), (X,), target="cpu", validate="off").report.checks == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"validate": "maybe"}, ThresherError, "validate must be one of"),
        ({"target": "tpu"}, BackendError, "unknown target 'tpu'"),
        ({"target": "cuda:90"}, BackendError, "cuda:sm_NN"),
        ({"backend": "none"}, BackendError, "unknown backend 'none'; known: eager, tvm"),
        ({"passes": "no-such"}, PassError, "unknown pass"),
        ({"passes": ["fold-channels{depth=1}"]}, PassError, "no option"),
        ({"passes": ["fold-batch-norm"]}, PassError, "requires evaluate-constants"),
    ],
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        thresher.compile(mlp(), (X,), **{"target": "cpu", **options})


def half_dead() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[0].weight[::2] = 0
        model[0].bias[::2] = 0
    return model


@pytest.mark.parametrize(("fastest", "hidden"), [("folded", 3), ("not folded", 6), ("to the last channel", 3)])
def test_measured_widths_keep_the_fastest(fastest: str, hidden: int) -> None:
    """Whichever candidate the clock prefers is what comes back, and all times are told."""
    model = half_dead()
    clock = FakeClock({fastest: 1.0})
    compiled = compile_with(clock, model, (X,), target="cpu", backend="eager", widths="measured")
    assert compiled.report.widths[fastest] == min(compiled.report.widths.values())
    assert compiled.report.after.parameters == hidden * 4 + hidden + 2 * hidden + 2
    assert torch.allclose(compiled(X), model(X), atol=1e-6)
    assert "widths measured" in str(compiled.report)
    assert "Widths measured" in compiled.report.to_html()


def test_measured_widths_by_the_real_clock() -> None:
    compiled = thresher.compile(half_dead(), (X,), target="cpu", widths="measured")
    assert set(compiled.report.widths) == {"folded", "to the last channel", "to whole tiles", "not folded"}
    assert torch.allclose(compiled(X), half_dead()(X), atol=1e-6)
    with pytest.raises(PassError, match="needs the pass fold-channels"):
        thresher.compile(half_dead(), (X,), target="cpu", passes="canonicalize", widths="measured")


def test_memory_is_reported(tmp_path) -> None:
    """Weights as packed, planned buffers, and what the operators would take one after the other; the artifact tells the same."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8)).eval()
    x = torch.randn(16, 64)
    compiled = thresher.compile(model, (x,), target="cpu")
    memory = compiled.report.memory
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert weights <= memory["weights"] <= 1.5 * weights
    assert memory["one operator at a time"] == 4 * 16 * 128 * 2  # a value and the one it is made from
    assert 4 * 16 * 128 <= memory["activations"] <= 4 * 16 * 128 * 2
    loaded = thresher.load(compiled.save(tmp_path / "m.thresher") or tmp_path / "m.thresher")
    assert loaded.executable.memory == compiled.executable.memory
    assert "one operator at a time" in str(compiled.report)


def test_pipelines_and_passes_mix() -> None:
    compiled = thresher.compile(mlp(), (X,), target="cpu", passes=["canonicalize", "fold-channels"])
    names = [r.name for r in compiled.report.passes]
    specialize = [p.name for p in pipelines.specialize]
    assert names[: -len(specialize)][-1] == "fold-channels" and names[-len(specialize) :] == specialize
    none = thresher.compile(mlp(), (X,), target="cpu", passes="none", backend="eager")
    assert none.report.passes == []


def test_eager_backend_is_the_reference() -> None:
    model = mlp()
    torch.testing.assert_close(thresher.compile(model, (X,), backend="eager", target="cpu")(X), model(X))


def test_an_operator_without_lowering_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.kthvalue(2, -1).values

    with pytest.raises(BackendError, match=r"cannot lower node .*kthvalue.*test_compile.py"):
        thresher.compile(Odd(), (X,), target="cpu", library="never")


def test_calls_from_many_threads() -> None:
    compiled, model = thresher.compile(mlp(), (X,), target="cpu"), mlp()
    failures: list[str] = []

    def work(seed: int) -> None:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        for _ in range(50):
            if not torch.allclose(compiled(x), model(x), atol=1e-5):
                failures.append(str(seed))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_outputs_outlive_the_next_call() -> None:
    compiled = thresher.compile(mlp(), (X,), target="cpu")
    first = compiled(X)
    kept = first.clone()
    compiled(X + 1)
    torch.testing.assert_close(first, kept)


def test_non_contiguous_and_differentiable_inputs() -> None:
    compiled, model = thresher.compile(mlp(), (X,), target="cpu"), mlp()
    x = torch.randn(4, 3).T.requires_grad_()
    torch.testing.assert_close(compiled(x), model(x).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes"), [("resnet18", ()), ("bert", ()), ("llama", ()), ("vit", (1, 4)), ("unet", (1, 4))]
)
def test_dynamic_batch(name: str, sizes: tuple[int, ...]) -> None:
    """All at once, and in pieces."""
    model, args = ZOO[name]()
    settle(model)
    batch = torch.export.Dim("batch", min=1, max=16)
    compiled = thresher.compile(
        model, args, target="cpu", dynamic_shapes=tuple({0: batch} for _ in args), batch_sizes=sizes
    )
    for size in (1, 5):
        inputs = tuple(torch.cat([a] * 3)[:size] for a in args)
        with torch.no_grad():
            expected = torch.utils._pytree.tree_leaves(model(*inputs))
        found = torch.utils._pytree.tree_leaves(compiled(*inputs))
        for e, f in zip(expected, found):
            assert e.shape == f.shape
            assert (e - f).abs().max() <= 1e-4 * e.abs().max()


def test_a_view_at_an_odd_address() -> None:
    """A slice of a tensor starts anywhere; vector loads must not fault on it."""
    compiled, model = thresher.compile(mlp(), (X,), target="cpu"), mlp()
    for shift in range(1, 17):
        x = torch.randn(12 + shift)[shift:].view(3, 4)
        torch.testing.assert_close(compiled(x), model(x).detach(), atol=1e-5, rtol=1e-4)


def test_an_index_outside_the_table_reads_no_foreign_memory() -> None:
    table = nn.Embedding(10, 4)
    compiled = thresher.compile(table, (torch.tensor([[1, 2]]),), target="cpu")
    found = compiled(torch.tensor([[-(10**9), 10**9]]))
    torch.testing.assert_close(found, table.weight[[0, 9]].detach()[None])


def test_report_round_trips_and_shows() -> None:
    model, args = ZOO["mobilenet"]()
    report = thresher.compile(settle(model), args, target="cpu").report
    assert Report.from_json(report.to_json()) == report
    json.loads(report.to_json())
    assert "fold-batch-norm" in str(report) and "parameters" in str(report)
    page = report.to_html()
    assert page.startswith("<!doctype html>") and "http" not in page.replace("http://www.w3.org", "")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cuda_is_cross_compiled(arch: str, tmp_path) -> None:
    """Without a GPU: the artifact holds device code, and says that it cannot run here."""
    model, args = ZOO["vit"]()
    compiled = thresher.compile(model.eval(), args, target=f"cuda:{arch}")
    source = compiled.executable.device_code()
    assert source.count("__global__") >= 10
    path = compiled.save(tmp_path / "m.thresher")
    with zipfile.ZipFile(path) as package:
        assert b"__global__" in package.read("main/model.so")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            compiled.executable.run(list(args))
        with pytest.raises(BackendError, match="no CUDA driver here"):
            thresher.load(path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(ZOO))
def test_cuda_runs(name: str) -> None:
    model, args = ZOO[name]()
    model, args = settle(model).cuda(), tuple(a.cuda() for a in args)
    compiled = thresher.compile(model, args)
    assert all(c.passed for c in compiled.report.checks)


def test_backend_can_be_found_by_entry_point() -> None:
    from thresher.backends.base import find_backend

    assert isinstance(find_backend("tvm"), TVMBackend)


def test_a_cpu_that_is_not_here(tmp_path) -> None:
    """Code for another CPU is built and saved, and refused rather than run."""
    from thresher.backends.tvm.cpu import cpu_name, missing_features

    foreign = next(c for c in ("sapphirerapids", "knl", "alderlake", "x86-64-v3") if missing_features(c))
    compiled = thresher.compile(nn.Linear(64, 64).eval(), (torch.randn(32, 64),), target=f"cpu:{foreign}")
    assert [c.name for c in compiled.report.checks if c.name.startswith("compiled")] == []
    compiled.save(tmp_path / "m.thresher")
    with pytest.raises(BackendError, match=f"{foreign}.*lacks"):
        compiled(torch.randn(32, 64))
    assert missing_features(cpu_name()) == []


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(thresher.ThresherError, match="tpu"):
        thresher.compile(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target="tpu", backend="eager")
