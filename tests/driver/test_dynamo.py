"""torch.compile(backend="thresher"): one graph and several, constants, shapes, the cache, and what runs as it is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from thresher.driver import dynamo
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
    real = dynamo.compile_model

    def build(model, args, **how):
        found.append(how)
        return real(model, args, **how)

    monkeypatch.setattr(dynamo, "compile_model", build)
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


def test_every_size_is_built_once(builds) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="thresher", dynamic=True)
    with torch.no_grad():
        for n in (2, 5, 2, 5, 5):
            x = torch.randn(n, 16)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(builds) == len(dynamo.built()) == 2


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
    """Writes into a buffer: a compiled model has no state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


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
