"""torch.compile(backend="thresher"): one graph and several, constants, shapes, the cache, and what runs as it is."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import prune

from helpers.writes import METADATA, PATTERNS
from thresher.driver import dynamo
from thresher.errors import CaptureError
from thresher.testing import ZOO, mask_channels, settle


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo._WARNED.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def builds(monkeypatch) -> list[dict]:
    """The options of every build."""
    found: list[dict] = []
    real = dynamo._compile

    def build(program, options):
        found.append(vars(options))
        return real(program, options)

    monkeypatch.setattr(dynamo, "_compile", build)
    return found


def mlp() -> nn.Module:
    torch.manual_seed(0)
    model = settle(nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8)))
    prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
    with torch.no_grad():
        model[0].bias[(model[0].weight == 0).all(1)] = 0
    return model


def run(model: nn.Module, *args: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend="thresher", options=options or None)(*args)


def test_pruned_channels_fold(builds) -> None:
    """Parameters are constants; the weight that the pruning hook makes is an output that depends on no input."""
    model, x = mlp(), torch.randn(5, 16)
    torch.testing.assert_close(run(model, x), model(x), rtol=1e-4, atol=1e-5)
    (compiled,) = dynamo.built()
    assert compiled.report.after.parameters < 0.7 * compiled.report.before.parameters and len(builds) == 1


class Broken(nn.Module):
    """Two graph breaks, one of them in a loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        torch._dynamo.graph_break()
        if x.sum() > 0:
            x = self.b(x).tanh()
        return self.c(x)


def test_graph_breaks() -> None:
    model, x = Broken().eval(), torch.randn(3, 8)
    torch.testing.assert_close(run(model, x), model(x), rtol=1e-4, atol=1e-5)
    assert len(dynamo.built()) == 3


@pytest.mark.parametrize("name", ["bert_masked", "vit"])
def test_models(name: str) -> None:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    model = mask_channels(settle(model), 0.5)
    wanted = model(*args)
    found = run(model, *args)
    for a, b in zip(torch.utils._pytree.tree_leaves(wanted), torch.utils._pytree.tree_leaves(found)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert dynamo.built()


def test_free_sizes_are_built_once(builds) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="thresher", dynamic=True)
    with torch.no_grad():
        for n in (2, 5, 2, 9, 3):
            x = torch.randn(n, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == len(dynamo.built()) == 1


def test_sizes_that_cannot_stay_free_are_built_a_few_times(builds, monkeypatch) -> None:
    monkeypatch.setattr(dynamo, "MAX_SIZES", 2)
    real = dynamo.FunctionalGraph.program

    def fixed(graph, values, constants, results, free):
        if free:
            raise CaptureError("not for any size")
        return real(graph, values, constants, results, free)

    monkeypatch.setattr(dynamo.FunctionalGraph, "program", fixed)
    model = mlp()
    compiled = torch.compile(model, backend="thresher", dynamic=True)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for n in (2, 5, 2, 9, 9):
            x = torch.randn(n, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == 2 and sum("called with more than 2 sizes" in str(w.message) for w in caught) == 1


def test_modules_that_share_a_graph_keep_their_builds(builds) -> None:
    """Dynamo hands both to one graph; each has its own constants, and a write makes those anew that it concerns."""
    x, models = torch.randn(5, 16), [mlp(), mlp()]
    with torch.no_grad():
        models[1][3].weight.mul_(2)
        compiled = [torch.compile(model, backend="thresher") for model in models]
        for _ in range(3):
            for run_it, model in zip(compiled, models):
                torch.testing.assert_close(run_it(x), model(x), rtol=1e-4, atol=1e-5)
        assert len(builds) == 2
        models[0][3].bias.add_(1)
        for run_it, model in zip(compiled, models):
            torch.testing.assert_close(run_it(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == 3
    assert all(c.report.after.parameters < 0.7 * c.report.before.parameters for c in dynamo.built())


def test_results_of_free_sizes_share_memory() -> None:
    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 1
        return y[: x.shape[0] // 2], y.view(-1)

    compiled = torch.compile(halves, backend="thresher", dynamic=True)
    with torch.no_grad():
        for n in (4, 6):
            first, whole = compiled(torch.zeros(n, 3))
            whole.add_(1)
            assert first.tolist() == [[2.0] * 3] * (n // 2)


class Counter(nn.Module):
    """A number of Python that counts the calls, and decides how much is read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor, by: int) -> tuple[Tensor, int]:
        self.seen += by
        return (torch.arange(8) < self.seen) * x, self.seen + 1


def test_a_counter_is_built_once_it_is_free(builds) -> None:
    mine, its = Counter(), Counter()
    compiled, x = torch.compile(mine, backend="thresher"), torch.randn(8)
    with torch.no_grad():
        for by in (1, 2, 3, 4, -9, 5, 6):
            found, wanted = compiled(x, by), its(x, by)
            assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    assert mine.seen == its.seen == 12 and len(builds) <= 4  # Dynamo frees one number after the other


def test_numbers_of_python_are_inputs(builds) -> None:
    compiled = torch.compile(lambda x, scale: x * scale + 1, backend="thresher")
    with torch.no_grad():
        for scale in (0.5, 0.25, 0.125, 2.5):
            torch.testing.assert_close(compiled(torch.ones(3), scale), torch.ones(3) * scale + 1)
    assert len(builds) <= 2


def test_options_reach_the_passes(builds) -> None:
    model, x = mlp(), torch.randn(5, 16)
    run(model, x, passes=["canonicalize", "fold-channels{min_improvement=0}"], validate="warn")
    assert builds[0]["validate"] == "warn" and builds[0]["passes"][1] == "fold-channels{min_improvement=0}"
    assert "fold-batch-norm" not in [r.name for r in dynamo.built()[0].report.passes]
    with pytest.raises(
        Exception, match="no option 'pases'; its options: backend, batch_sizes, budget, calibration, fallback"
    ):
        run(mlp(), x, pases="none")


def test_the_cache_knows_graphs_numbers_and_passes(builds) -> None:
    x = torch.randn(5, 16)
    for _ in range(2):  # another module, the same numbers
        run(mlp(), x)
    assert len(builds) == 1
    run(mlp(), x, passes=["canonicalize"])
    assert len(builds) == 2
    other = mlp()
    with torch.no_grad():
        other[3].bias[0] += 1
    torch.testing.assert_close(run(other, x), other(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == 3
    assert (
        dynamo.identity("fold-channels")
        != dynamo.identity("fold-channels{min_improvement=0}")
        != dynamo.identity("simplify")
    )
    torch._dynamo.reset()
    assert not dynamo.built()


def test_changed_parameters_are_seen(builds) -> None:
    model, x = mlp(), torch.randn(5, 16)
    compiled = torch.compile(model, backend="thresher")
    with torch.no_grad():
        before = compiled(x)
        model[3].bias += 1
        torch.testing.assert_close(compiled(x), before + 1, rtol=1e-4, atol=1e-4)
    assert len(builds) == 2


def test_gradients_are_dynamos(builds) -> None:
    model, x = mlp(), torch.randn(5, 16)
    with pytest.warns(UserWarning, match="a gradient is asked for"):
        torch.compile(model, backend="thresher")(x).sum().backward()
    assert model[3].weight.grad is not None and not builds
    with torch.inference_mode():
        found = torch.compile(model, backend="thresher")(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == 1


class Counts(nn.Module):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_buffers_are_written(builds) -> None:
    model, x = Counts().eval(), torch.ones(3)
    compiled = torch.compile(model, backend="thresher")
    with torch.no_grad():
        assert [compiled(x)[0].item() for _ in range(3)] == [1, 2, 3]
    assert model.calls == 3 and len(builds) == 1


def test_a_buffer_that_others_change_becomes_an_input(builds) -> None:
    class Shifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    model, x = Shifts(), torch.ones(3)
    compiled = torch.compile(model, backend="thresher")
    with torch.no_grad():
        for step in range(4):
            assert compiled(x).tolist() == [1 + step] * 3
            model.shift += 1
    assert len(builds) == 2


def clones(tree: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def memory(*trees: Any) -> list[int]:
    """Which tensors share storage: for each the index of the first one with its storage."""
    storages = [v.untyped_storage().data_ptr() for v in pytree.tree_leaves(trees) if isinstance(v, Tensor)]
    return [storages.index(s) for s in storages]


def assert_as_eager(function: Any, args: tuple, **options: Any) -> None:
    """Results, arguments and what shares memory with what, over two calls."""
    compiled = torch.compile(function, backend="thresher", options=options or None)
    mine, its = clones(args), clones(args)
    with torch.no_grad():
        for _ in range(2):
            found, wanted = compiled(*mine), function(*its)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
            assert memory(found, mine) == memory(wanted, its)


@pytest.mark.parametrize("name", [*PATTERNS, *(n for n in METADATA if n not in ("resized", "data_replaced"))])
def test_writes_views_and_aliases_are_torchs(name: str) -> None:
    function, args = {**PATTERNS, **METADATA}[name]
    assert_as_eager(function, args(), backend="eager")


def test_an_input_given_twice_is_written_once() -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x * y

    compiled = torch.compile(both, backend="thresher", options={"backend": "eager"})
    for overlap in (lambda x: x, lambda x: x[:], lambda x: x.view(-1)[:4]):
        mine, its = torch.ones(4), torch.ones(4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(mine, overlap(mine)), both(its, overlap(its)))
        torch.testing.assert_close(mine, its)


def test_a_copy_is_a_copy() -> None:
    """Also where a pass sees that it has the values of the input."""
    x = torch.ones(4)
    table = torch.full((4,), 3.0)
    compiled = torch.compile(
        lambda x: (x.clone(), x.clone() + 0, table.clone() * x.clone(), x.clone()), backend="thresher"
    )
    with torch.no_grad():
        for _ in range(2):
            results = compiled(x)
            assert len(set(memory(x, results))) == 5
            for result in results:
                result.add_(1)
    assert x.tolist() == [1] * 4 and results[2].tolist() == [4] * 4


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    x = torch.ones(3)
    with torch.no_grad(), pytest.warns(UserWarning, match="runs in eager mode: the model draws random numbers"):
        assert torch.compile(lambda x: torch.rand_like(x) + x, backend="thresher")(x).min() >= 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match="draws random numbers"):
        run(lambda x: torch.rand_like(x) + x, x, fallback=False)


def test_found_without_an_import() -> None:
    code = (
        "import torch; f = torch.compile(lambda x: x.relu() + 1, backend='thresher');\n"
        "with torch.no_grad(): print(f(torch.tensor([-1.0, 2.0])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[1.0, 3.0]", done.stderr
