"""Every kind of artifact with both loaders: the same results, the same verdict on the stored outputs, the same words for bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import thresher
from thresher.artifact import numpy_reader
from thresher.errors import InputError, ValidationError
from thresher.runtime.reference_run import ReferenceRun

X = torch.randn(2, 3)
BATCH = torch.export.Dim("batch")


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Nested(nn.Module):
    """Tuples, lists, dictionaries and literals, in and out."""

    def forward(self, pair: tuple[Tensor, list[Tensor]], *, scale: Tensor, more: dict[str, Tensor], flag: bool) -> dict:
        a, (b,) = pair
        return {"sum": (a + b) * scale, "parts": [a + 1, (more["x"], 7, None)]}


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.layer(self.table(ids))
        return y, y.argmax(-1), y > 0


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)).eval()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple, dict[str, Any], dict[str, Any]]] = {
    "one": (linear, (X,), {}, {}),
    "batches": (linear, (torch.randn(11, 3),), {}, {"dynamic_shapes": {"input": {0: BATCH}}, "batch_sizes": (1, 4)}),
    "free": (linear, (torch.randn(11, 3),), {}, {"dynamic_shapes": {"input": {0: BATCH}}, "batch_sizes": ()}),
    "nested": (Nested, ((X, [X]),), {"scale": X, "more": {"x": X}, "flag": True}, {}),
    "integers": (Integers, (torch.tensor([[3, 4]]),), {}, {}),
    "float16": (lambda: Function(lambda x: (x * 2, x.sum(-1))), (X.half(),), {}, {}),
    "bfloat16": (lambda: Function(lambda x: (x * 2, x.sum(-1))), (X.bfloat16(),), {}, {}),
    "float64": (lambda: Function(lambda x: x @ x.mT), (X.double(),), {}, {}),
    "infinities": (lambda: Function(lambda x: (torch.log(x - x), torch.sqrt(-1 - x * x), x)), (X,), {}, {}),
}
Case = tuple[thresher.Compiled, thresher.Compiled, numpy_reader.Model, tuple, dict[str, Any]]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    folder, cases = tmp_path_factory.mktemp("both"), {}

    def build(name: str) -> Case:
        if name not in cases:
            model, args, kwargs, options = CASES[name]
            compiled = thresher.compile(model(), args, kwargs, target="cpu", library="never", **options)
            path = compiled.save(folder / f"{name}.thresher")
            cases[name] = compiled, thresher.load(path), numpy_reader.load(path), args, kwargs
        return cases[name]

    return build


def arrays(tree: Any) -> Any:
    return pytree.tree_map(lambda v: as_array(v) if isinstance(v, Tensor) else v, tree)


def as_array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", CASES)
def test_the_same_results_and_the_same_proof(artifacts: Callable[[str], Case], name: str) -> None:
    compiled, with_torch, with_numpy, args, kwargs = artifacts(name)
    expected = arrays(compiled(*args, **kwargs))
    leaves, spec = pytree.tree_flatten(expected)
    for result in (
        arrays(with_torch(*args, **kwargs)),
        *(m(*arrays(args), **arrays(kwargs)) for m in (with_torch, with_numpy)),
    ):
        others, other_spec = pytree.tree_flatten(result)
        assert other_spec == spec
        for a, b in zip(leaves, others):
            assert type(a) is type(b) and (not isinstance(a, np.ndarray) or a.dtype == b.dtype)
            np.testing.assert_array_equal(a, b)
    (check,) = with_torch.validate()
    assert check.passed and with_numpy.validate() == check.error
    assert with_torch.signature.to_json() == with_numpy.signature.to_json() == compiled.signature.to_json()


BAD: dict[str, list[tuple[tuple, dict[str, Any], str]]] = {
    "one": [
        ((), {}, "must be a tuple of 1"),
        ((X.numpy(), X.numpy()), {}, "must be a tuple of 1"),
        (([X.numpy()],), {}, "must be one value, not a list"),
        ((X.numpy(),), {"more": 1}, "takes no argument 'more'"),
        ((X.double().numpy(),), {}, "dtype float64, but the model was compiled for float32"),
        ((X.numpy()[:1],), {}, r"has shape \(1, 3\), but the model was compiled for \(2, 3\)"),
        ((X.numpy()[0],), {}, r"has shape \(3,\)"),
        ((3.0,), {}, "must be a tensor or a NumPy array, not float"),
        ((np.float32(3),), {}, "must be a tensor or a NumPy array, not float32"),
        ((None,), {}, "not NoneType"),
        ((torch.zeros(2, 3, device="meta"),), {}, "is on meta, but the model was compiled for cpu"),
    ],
    "free": [((X.numpy()[:, :2],), {}, r"has shape \(2, 2\), but the model was compiled for \(\w+, 3\)")],
    "nested": [
        (((X.numpy(), [X]),), {"scale": X.numpy(), "more": {"x": X.numpy()}, "flag": True}, "mix torch tensors and NumPy"),
        (((X.numpy(), [X.numpy()]),), {"scale": X.numpy(), "more": {"x": X.numpy()}, "flag": False}, "'flag' was True"),
        (((X.numpy(), [X.numpy()]),), {"scale": X.numpy(), "more": {"x": X.numpy()}, "flag": X.numpy()}, "'flag' was True"),
        (((X.numpy(), []),), {"scale": X.numpy(), "more": {"x": X.numpy()}, "flag": True}, "must be a list of 1"),
        (((X.numpy(), [X.numpy()]),), {"scale": X.numpy()}, "must be a dictionary of 'scale', 'more', 'flag'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_the_same_words_for_bad_arguments(artifacts: Callable[[str], Case], name: str) -> None:
    _, *models, _, _ = artifacts(name)
    for args, kwargs, message in BAD[name]:
        errors = []
        for model in models:
            with pytest.raises(InputError, match=message) as error:
                model(*args, **kwargs)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def changed(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("integers", 1, lambda y: y + 1),  # 10 % of the scale, perhaps: integers are exact
        ("one", 0, lambda y: y * (1 + 1e-3)),
        ("one", 0, lambda y: y[:1]),
        ("infinities", 0, lambda y: -y),
        (
            "infinities",
            1,
            lambda y: (np if isinstance(y, np.ndarray) else torch).full_like(y, np.inf),
        ),
        ("nested", 3, lambda y: 8),
    ],
)
def test_the_same_verdict_on_a_wrong_output(
    artifacts: Callable[[str], Case], name: str, index: int, change: Callable
) -> None:
    _, *models, _, _ = artifacts(name)
    for model in models:
        run = model.reference_run
        wrong = ReferenceRun(run.inputs, changed(run.outputs, index, change(run.outputs[index])), run.steps)
        execute = model.executable.run if isinstance(model, thresher.Compiled) else model.run
        with pytest.raises(ValidationError, match="stored probe: error"):
            wrong.check(model.signature, execute)


def test_the_same_verdict_on_a_wrong_number_of_values(artifacts: Callable[[str], Case]) -> None:
    _, *models, _, _ = artifacts("one")
    for model in models:
        run, execute = model.reference_run, getattr(model, "run", None) or model.executable.run
        with pytest.raises(InputError, match="takes 1 values, not 2"):
            ReferenceRun(run.inputs * 2, run.outputs).check(model.signature, execute)
        with pytest.raises(ValidationError, match="2 outputs against 1"):
            ReferenceRun(run.inputs, run.outputs * 2).check(model.signature, execute)


def test_a_bundle(artifacts: Callable[[str], Case], tmp_path: Path) -> None:
    path = thresher.Bundle({"a": artifacts("one")[0], "b": artifacts("nested")[0]}).save(tmp_path / "b.thresher")
    with_torch, with_numpy = thresher.load(path), numpy_reader.load(path)
    assert list(with_torch) == list(with_numpy) == ["a", "b"]
    assert {n: c.error for n, (c,) in with_torch.validate().items()} == with_numpy.validate()
    np.testing.assert_array_equal(with_torch["a"](X.numpy()), with_numpy["a"](X.numpy()))
