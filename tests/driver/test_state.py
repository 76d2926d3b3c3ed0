"""compile() and rewrite() of models that write: into their arguments, into their buffers. Everything that eager writes is written."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import thresher
from helpers.modules import Function
from helpers.writes import METADATA, PATTERNS
from thresher.artifact import numpy_reader
from thresher.errors import BackendError, CaptureError, InputError
from thresher.exporters.onnx import write_onnx


def clones(tree: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def assert_same_calls(compiled: Any, eager: Any, args: tuple, calls: int = 2) -> None:
    """Results and arguments, after each of several calls on the same tensors."""
    mine, its = clones(args), clones(args)
    for _ in range(calls):
        with torch.no_grad():
            torch.testing.assert_close(clones(compiled(*mine)), clones(eager(*its)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PATTERNS)
def test_arguments_are_written(name: str) -> None:
    function, args = PATTERNS[name]
    model = Function(function)
    assert_same_calls(thresher.compile(model, args(), backend="eager"), model, args())
    if name in FEW:
        assert_same_calls(thresher.rewrite(model, args()), model, args())


FEW = ("index_copy", "nested", "swapped", "another_input_written")


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in PATTERNS])
def test_compiled_code_writes_arguments(name: str) -> None:
    function, args = PATTERNS[name]
    model = Function(function)
    try:
        compiled = thresher.compile(model, args(), target="cpu")
    except BackendError as error:  # by name, never something else
        assert name not in FEW and "cannot lower node" in str(error)
        return
    assert_same_calls(compiled, model, args())


@pytest.mark.parametrize("name", METADATA)
def test_shapes_changed_in_place_are_refused(name: str) -> None:
    function, args = METADATA[name]
    with pytest.raises(CaptureError, match=r"the model changes the shape, .* of its argument at \[0\] in place"):
        thresher.compile(Function(function), args(), backend="eager")


class Recurrent(nn.Module):
    """State in a buffer, a step that is a number in a tensor, and layers that fold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        self.register_buffer("h", torch.zeros(2, 4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.full((4,), 0.5))
        with torch.no_grad():
            self.a.weight[2:4] = 0
            self.a.bias[2:4] = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.steps += 1
        self.h = torch.tanh(self.b(torch.relu(self.a(self.h + x)))) * self.scale
        return self.h / self.steps, self.h


X = torch.ones(2, 4)


def test_buffers_are_the_compiled_models_own() -> None:
    model = Recurrent().eval()
    before = copy.deepcopy(model.state_dict())
    compiled = thresher.compile(model, (X,), target="cpu", library="never")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert compiled.report.after.parameters < compiled.report.before.parameters
    assert dict(compiled.state) == {"h": compiled.state["h"], "steps": compiled.state["steps"]}
    assert_same_calls(compiled, model, (X,), calls=3)
    torch.testing.assert_close(dict(compiled.state), {"h": model.h, "steps": model.steps}, rtol=1e-5, atol=1e-6)
    compiled.validate()  # from the first state on, and changes nothing
    assert compiled.state["steps"] == 3
    compiled.state.reset()
    assert_same_calls(compiled, Recurrent().eval(), (X,))
    compiled.state["h"].zero_()  # the caller's hands are free, too
    assert compiled(X)[0].isfinite().all()


def test_an_earlier_result_stays() -> None:
    compiled = thresher.compile(Recurrent().eval(), (X,), backend="eager")
    first = compiled(X)
    kept = clones(first)
    compiled(X)
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_the_state_is_in_the_artifact(tmp_path: Path) -> None:
    model = Recurrent().eval()
    compiled = thresher.compile(model, (X,), target="cpu", library="never")
    compiled(X)
    path = compiled.save(tmp_path / "m.thresher")
    loaded, with_numpy = thresher.load(path), numpy_reader.load(path)
    assert_same_calls(loaded, copy.deepcopy(model), (X,))
    for _ in range(2):
        expected = model(X)
        for result in (with_numpy(X.numpy()), loaded(X.numpy())):
            assert isinstance(result[0], np.ndarray)
        np.testing.assert_allclose(with_numpy.state["h"], expected[1].detach(), rtol=1e-5, atol=1e-6)
    assert loaded.state["steps"] == 4 and isinstance(loaded.state["h"], Tensor)
    with_numpy.state.reset()
    assert with_numpy.state["steps"] == 0 and with_numpy.validate() < 1e-4


def test_two_models_share_what_they_keep() -> None:
    """Prefill and decode of a language model."""
    one = thresher.compile(Recurrent().eval(), (X,), backend="eager")
    other = thresher.compile(Recurrent().eval(), (X * 3,), backend="eager")
    other.state = one.state
    one(X)
    other(X)
    assert one.state["steps"] == other.state["steps"] == 2
    other.state = thresher.compile(Counts(), (torch.ones(3),), backend="eager").state
    with pytest.raises(InputError, match="the model keeps 'h', and the state that it was given has n"):
        other(X)


def test_rewrite_writes_and_unfolds() -> None:
    model = Recurrent().eval()
    small = thresher.rewrite(model, (X,))
    assert_same_calls(small, model, (X,), calls=3)
    assert small.a.weight.shape[0] < 6 and small.steps == 3
    torch.testing.assert_close(small.unfold(), dict(model.state_dict()), rtol=1e-5, atol=1e-6)
    small(X)[0].sum().backward()  # through the old values, which the buffers do not hold any more
    assert small.b.weight.grad is not None


def test_calls_of_several_threads_wait_for_each_other() -> None:
    compiled = thresher.compile(Recurrent().eval(), (X,), target="cpu", library="never")
    threads = [threading.Thread(target=lambda: [compiled(X) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiled.state["steps"] == 100


class Table(nn.Module):
    """Gives away a constant, its input, and one value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.full((4,), 3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return self.table, x, y, y.view(2, 2)


@pytest.mark.parametrize("backend", ["eager", "tvm"])
def test_results_are_the_callers(backend: str) -> None:
    compiled, x = thresher.compile(Table(), (torch.ones(4),), backend=backend, target="cpu"), torch.ones(4)
    for _ in range(2):
        results = compiled(x)
        assert [r.sum() for r in results] == [12, 4, 8, 8]
        for result in results:
            result.zero_()
    assert x.tolist() == [1] * 4


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.n.add_(1)
        return x * self.n


class Shared(nn.Module):
    """One module with state, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Counts()
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Parameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(2)
        return x * self.weight


class Plain(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.h, self.last = in_place, torch.zeros(3), torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.h.add_(x)
        else:
            self.h = self.h + x
        self.last = x * 2  # nobody reads it
        return self.h * 2


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (Counts, {"n"}),
        (Shared, {"b.n"}),
        (Parameter, {"weight"}),
        (lambda: Plain(False), {"h"}),
        (lambda: Plain(True), {"h"}),
    ],
)
def test_whatever_the_model_keeps(make: Any, names: set[str]) -> None:
    model = make().eval()
    kept = copy.deepcopy(model.state_dict())
    compiled = thresher.compile(model, (torch.zeros(3),), backend="eager")
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    assert set(compiled.state) == names
    assert_same_calls(compiled, model, (torch.ones(3),), calls=3)


def test_a_state_that_is_only_assigned_anew_is_a_constant() -> None:
    class Moves(nn.Module):
        """CTRL of transformers does so with its positions."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.table = self.table.to(device=x.device, dtype=x.dtype)
            return x + self.table

    assert not thresher.compile(Moves(), (torch.ones(4, 3),), backend="eager").state


def test_a_free_batch_is_computed_at_once_and_the_report_says_why() -> None:
    model = Function(lambda x, y: (x * 2, y.add_(1))[0])
    batch = torch.export.Dim("batch", min=2)
    shapes = {"inputs": ({0: batch}, None)}
    compiled = thresher.compile(model, (torch.ones(3, 4), torch.zeros(2)), dynamic_shapes=shapes, target="cpu")
    assert "the model writes into inputs_1" in compiled.report.batch
    y = torch.zeros(2)
    assert compiled(torch.ones(7, 4), y).shape == (7, 4) and y.tolist() == [1, 1]


# ---------------------------------------------------------------------- refused by name


def compiled_sum() -> thresher.Compiled:
    return thresher.compile(Function(lambda x, y: (x.add_(y), x * y)[1]), (X.clone(), X.clone()), backend="eager")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (lambda: X.clone(), lambda x: x, "'inputs_0', which shares memory with 'inputs_1'"),
        (lambda: torch.ones(12), lambda x: x[4:].view(2, 4), "shares memory"),
        (lambda: torch.ones(2, 1).expand(2, 4), lambda x: X, "'inputs_0', which repeats an element"),
        (lambda: np.broadcast_to(np.ones((2, 1), "f"), (2, 4)).copy()[:, :], lambda x: x, "shares memory"),
        (lambda: read_only(), lambda x: X.numpy(), "'inputs_0', which is read-only"),
        (lambda: inference(), lambda x: X, "'inputs_0', which was made in inference mode"),
    ],
)
def test_arguments_that_cannot_be_written(x: Any, y: Any, message: str) -> None:
    written = x()
    other = y(written)
    with pytest.raises(InputError, match=message):
        compiled_sum()(written[:8].view(2, 4) if written.ndim == 1 else written, other)


def read_only() -> np.ndarray:
    array = np.ones((2, 4), "f")
    array.flags.writeable = False
    return array


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, 4)


def test_columns_of_one_tensor_share_no_memory() -> None:
    both = torch.ones(2, 8)
    compiled_sum()(both[:, ::2], both[:, 1::2])
    assert both.tolist() == [[2, 1] * 4] * 2


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        compiled, x = compiled_sum(), torch.ones(2, 4)
        compiled(x, X.clone())
        state = thresher.compile(Counts(), (torch.ones(3),), backend="eager")
    assert x.tolist() == [[2.0] * 4] * 2
    assert state(torch.ones(3)).tolist() == [1, 1, 1]


def test_a_call_that_is_refused_writes_nothing() -> None:
    compiled = thresher.compile(Function(PATTERNS["several"][0]), PATTERNS["several"][1](), backend="eager")
    x, y, z = PATTERNS["several"][1]()
    before = x.clone()
    with pytest.raises(InputError):
        compiled(x, y, z.numpy())
    with pytest.raises(InputError):
        compiled(x, y, y)
    assert torch.equal(x, before)


def test_a_file_of_onnx_has_no_state(tmp_path: Path) -> None:
    small = thresher.rewrite(Counts(), (torch.ones(3),))
    with pytest.raises(BackendError, match="writes into 'n', and a file of ONNX has no state"):
        write_onnx(small, (torch.ones(3),), tmp_path / "x.onnx")
