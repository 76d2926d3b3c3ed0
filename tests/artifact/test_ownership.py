"""A compiled model has constants of its own: nothing that the user does to his tensors afterwards changes it, or what it is saved as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.verification.verifier import verify


class Net(nn.Module):
    """Constants that are packed (linear layers) and constants that are not (a table, biases, a scale)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 8)
        self.scale = nn.Parameter(torch.rand(8) + 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.table(ids)))) * self.scale


IDS = torch.arange(12).reshape(3, 4)


def train_on(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("called", [True, False])
def test_training_changes_neither_the_compiled_nor_the_saved_model(tmp_path: Path, called: bool) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    expected = model(IDS)
    compiled = thresher.compile(model, (IDS,), target="cpu", validate="error" if called else "off")
    train_on(model)
    for result in (compiled, thresher.load(compiled.save(tmp_path / "m.thresher"))):
        torch.testing.assert_close(result(IDS), expected, rtol=1e-4, atol=1e-4)
        result.validate()


def test_the_eager_backend_too() -> None:
    model = Net().eval()
    expected = model(IDS)
    compiled = thresher.compile(model, (IDS,), backend="eager", target="cpu")
    train_on(model)
    torch.testing.assert_close(compiled(IDS), expected)


def test_packed_weights_are_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from thresher.backends.tvm import backend

    before, after, detached_weights = [], [], backend.detached_weights

    def watched(weights, *rest):
        before.extend(weights)
        after.extend(detached_weights(weights, *rest))
        return after

    monkeypatch.setattr(backend, "detached_weights", watched)
    thresher.compile(Net().eval(), (IDS,), target="cpu", validate="off")
    copied = {a.shape for a, b in zip(before, after, strict=True) if a is not b}
    assert (50, 32) in copied and not any(len(shape) > 2 for shape in copied)
    assert [a for a, b in zip(before, after) if a is b]


def test_the_sizes_of_batches_have_one_copy() -> None:
    batch = {"ids": {0: torch.export.Dim("batch")}}
    compiled = thresher.compile(
        Net().eval(), (torch.arange(44).reshape(11, 4),), target="cpu", dynamic_shapes=batch, batch_sizes=(1, 4)
    )
    tables = {id(w) for part in compiled.executable.parts.values() for w in part.weights if w.shape == (50, 32)}
    assert len(tables) == 1


class Remembering(nn.Module):
    """Returns a parameter as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.memory, self.memory


def test_the_reference_run_is_of_copies() -> None:
    model, x = Remembering().eval(), torch.rand(3, 4)
    exported = torch.export.export(model, (x,))
    for source in (model, exported):
        compiled = thresher.compile(source, (x,), target="cpu")
        train_on(model)
        x.add_(1)
        assert compiled.validate()[0].passed


def test_a_certificate_has_its_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[5:] = 0
    compiled = thresher.compile(model, (torch.randn(2, 8),), target="cpu", certificate=True, validate="off")
    proven = verify(compiled.certificate)
    train_on(model)
    assert verify(compiled.certificate) == proven
