"""A batch of any size in pieces: only where no sample reads another, for every number of samples, in every loader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import thresher
from thresher.analysis.slices.batch_independence import free_batch, why_samples_interact, with_batch
from thresher.artifact import numpy_reader
from thresher.cli.main import main
from thresher.errors import CaptureError, InputError
from thresher.ir.program import Program
from thresher.passes import pipelines
from thresher.rewriting.manager import PassManager
from thresher.runtime.batching import BatchSplitter
from thresher.testing.zoo import ZOO, settle
from thresher.verification.compare import compare

BATCH = torch.export.Dim("batch")


class Wrap(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def freed(model: nn.Module, args: tuple[Tensor, ...]) -> Program:
    several = tuple(torch.cat([a] * 4)[:4] for a in args)
    return thresher.capture(model, several, dynamic_shapes=tuple({0: BATCH} for _ in args))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_zoo_computes_each_sample_for_itself(name: str) -> None:
    """Proven, before the passes and after; and the program for two samples says of them what the one for any number says."""
    model, args = ZOO[name]()
    program = freed(settle(model), args)
    program = PassManager(pipelines.exact, "off").run(program)
    assert free_batch(program) and why_samples_interact(program) == ""
    two = with_batch(program, 2).verify()
    assert all(isinstance(d, int) for n in two.calls() for d in n.meta["val"].shape)
    assert not compare(program.run(*two.probe, dtype=torch.float64), two.run(*two.probe, dtype=torch.float64)).exceeds(
        1e-9
    )


MIXERS = {
    "a cache of samples": lambda x: x.index_copy(0, torch.tensor([1]), x[:1]),
    "an element of all": lambda x: torch.ops.aten.index_put(x, [torch.tensor([0, 1]), torch.tensor([2, 3])], x[0, :2]),
    "centred": lambda x: x - x.mean(0),
    "over the batch": lambda x: x.softmax(0),
    "turned round": lambda x: x.flip(0),
    "shifted": lambda x: x.roll(1, 0),
    "summed up": lambda x: x.cumsum(0),
    "sorted": lambda x: x.sort(0)[0],
    "against each other": lambda x: (x @ x.T)[:, :1],
    "attending to each other": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "as channels": lambda x: nn.functional.conv1d(x.T[None], torch.ones(6, 6, 3), padding=1)[0].T,
    "their number": lambda x: x * x.shape[0],
    "their place": lambda x: x + torch.arange(x.shape[0])[:, None],
    "the first of all": lambda x: x + x[:1],
    "the last of all": lambda x: x + x[-1:],
    "unbatched": lambda x: nn.functional.conv1d(x.T, torch.ones(6, 6, 3), padding=1).T,
    "best of all": lambda x: x.amax(0, keepdim=True) + x,
    "filled with their number": lambda x: x + torch.full((x.shape[0], 1), x.shape[0] * 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_what_mixes_samples_is_not_taken_apart(name: str) -> None:
    program = freed(Wrap(MIXERS[name]), (torch.randn(4, 6),))
    assert not free_batch(program) or why_samples_interact(program)


APART = {
    "a cache": lambda x: x.view(-1, 2, 3).index_copy(1, torch.tensor([1]), x.view(-1, 2, 3)[:, :1]).flatten(1),
    "rows": lambda x: x / x.sum(1, keepdim=True),
    "of length one": lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True),
    "a matrix": lambda x: (x.view(-1, 2, 3) @ x.view(-1, 3, 2)).flatten(1),
    "a constant": lambda x: torch.cat([x, torch.ones(x.shape[0], 1)], 1),
    "a table": lambda x: nn.functional.embedding(x.argmax(1), torch.arange(12.0).view(6, 2)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(*[x.view(-1, 1, 2, 3)] * 3).flatten(1),
    "one beside the other": lambda x: x.view(x.shape[0] * 2, 3).relu().view(x.shape[0], 6),
}


@pytest.mark.parametrize("name", sorted(APART))
def test_what_does_not_mix_is_taken_apart(name: str) -> None:
    program = freed(Wrap(APART[name]), (torch.rand(4, 6),))
    assert free_batch(program) and why_samples_interact(program) == ""


# ---------------------------------------------------------------------- pieces


@given(
    st.integers(0, 40),
    st.dictionaries(st.integers(1, 9), st.floats(0.1, 9.0), min_size=1, max_size=3),
    st.sampled_from(["numpy", "float32", "bfloat16", "bool"]),
)
def test_any_number_of_samples(count: int, times: dict[int, float], kind: str) -> None:
    """Each sample meets the code once, beside what all of them share; and no other cover takes less time."""

    def run(size: int) -> Callable[[list], list]:
        def call(inputs: list) -> list:
            assert len(inputs[0]) == size and inputs[1].shape == (2,)
            return [inputs[0], inputs[0][:, :1]]

        return call

    pieces = BatchSplitter({size: run(size) for size in times}, [True, False], times)
    x = torch.randint(0, 2, (count, 3))
    given_x = x.numpy() if kind == "numpy" else x.to(getattr(torch, kind))
    shared = np.zeros(2) if kind == "numpy" else torch.zeros(2)
    for found, want in zip(pieces([given_x, shared]), (given_x, given_x[:, :1])):
        assert type(found) is type(want) and found.dtype == want.dtype and found.shape == want.shape
        assert (found == want).all()
    taken = sum(times[size] for size in pieces.plan(count))
    assert all(taken <= times[b] * max(1, -(-count // b)) + 1e-9 for b in times)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


@pytest.fixture(scope="module")
def compiled(model: nn.Module) -> thresher.Compiled:
    shapes = {"input": {0: BATCH}}
    return thresher.compile(model, (torch.randn(11, 3, 8, 8),), target="cpu", dynamic_shapes=shapes, batch_sizes=(1, 4))


def test_compiled_and_saved(model: nn.Module, compiled: thresher.Compiled, tmp_path: Path) -> None:
    path = compiled.save(tmp_path / "m.thresher")
    assert "in pieces of 1" in compiled.report.batch and "batch of 4" in str(compiled.report)
    loaded = [compiled, thresher.load(path), numpy_reader.load(path)]
    for count in (0, 1, 3, 4, 9):
        x = torch.randn(count, 3, 8, 8)
        for one in loaded:
            found = torch.as_tensor(one(x.numpy()))
            torch.testing.assert_close(found, model(x).detach(), rtol=1e-4, atol=1e-5)
    assert thresher.load(thresher.load(path).save(tmp_path / "again.thresher")).validate()[0].passed
    with pytest.raises(InputError, match="has shape"):
        compiled(torch.randn(2, 3, 8, 9))


def test_a_batch_that_mixes_is_compiled_whole_and_says_why() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    compiled = thresher.compile(Centred(), (torch.randn(3, 4),), target="cpu", dynamic_shapes={"x": {0: BATCH}})
    x = torch.randn(7, 4)
    torch.testing.assert_close(compiled(x), x - x.mean(0))
    assert "may depend on x of another" in compiled.report.batch


def test_a_batch_of_one_that_has_another_shape_is_no_piece() -> None:
    """What ``squeeze`` does to one sample it does to no other number of them."""

    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).squeeze(0)

    x = torch.randn(8, 4)
    compiled = thresher.compile(Squeezed(), (x,), target="cpu", dynamic_shapes={"x": {0: BATCH}})
    assert "has another shape for a batch of 1" in compiled.report.batch
    torch.testing.assert_close(compiled(x[:3]), x[:3] * 2)
    assert why_samples_interact(freed(Squeezed(), (x,)), (2, 8)) == ""


def test_an_exported_program_has_its_sizes() -> None:
    exported = torch.export.export(nn.Linear(3, 2), (torch.randn(2, 3),))
    with pytest.raises(CaptureError, match=r"give dynamic_shapes= to torch\.export"):
        thresher.compile(exported, dynamic_shapes=({0: BATCH},))


def test_bad_sizes() -> None:
    with pytest.raises(InputError, match="positive whole numbers"):
        thresher.compile(nn.ReLU(), (torch.randn(2, 3),), batch_sizes=(0, 2))


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(3, 2), (torch.zeros(1, 3),)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert (
        main(["build", "mine:make", "--batch", "1,4", "-o", "m.thresher", "--target", "cpu", "--onnx", "m.onnx"]) == 0
    )
    assert onnx.load("m.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1  # of the example
    assert "any size, in pieces of 1" in capsys.readouterr().out
    assert thresher.load("m.thresher")(torch.zeros(6, 3)).shape == (6, 2)
