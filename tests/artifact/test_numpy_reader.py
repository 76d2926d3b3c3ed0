"""An artifact where torch is not installed: a real environment without it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thresher
from thresher.artifact.numpy_reader import load
from thresher.errors import BackendError, InputError
from thresher.runtime.pytree import PyTree
from thresher.testing import ZOO, settle

ROOT = Path(__file__).parents[2]
SITE = Path(np.__file__).parents[1]
NEEDED = (
    "tvm",
    "tvm_ffi",
    "numpy",
    "numpy.libs",
    "ml_dtypes",
    "safetensors",
    "typing_extensions.py",
    "apache_tvm.libs",
    "apache_tvm_ffi.libs",
)


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose only packages are TVM, NumPy, safetensors and ours."""
    site = tmp_path / "site"
    site.mkdir()
    for item in SITE.iterdir():
        metadata = item.suffix == ".dist-info" and item.name.startswith(("apache_tvm", "numpy", "safetensors"))
        if item.name in NEEDED or metadata:
            (site / item.name).symlink_to(item)
    ours = site / "thresher"
    ours.mkdir()
    for item in [*(ROOT / "compiler").iterdir(), *(ROOT / name for name in ("passes", "backends", "models"))]:
        (ours / item.name).symlink_to(item)
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "HOME": str(tmp_path)}


def run(code: str, environment: dict[str, str], folder: Path) -> str:
    """In the interpreter that the environment was made from, without its packages (-S)."""
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    command = [python, "-S", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Nested(nn.Module):
    """Tuples, lists, dictionaries and a literal, in and out."""

    def forward(self, pair: tuple[Tensor, list[Tensor]], *, scale: Tensor, more: dict[str, Tensor]) -> dict:
        a, (b,) = pair
        return {"sum": (a + b) * scale, "parts": [a, (more["x"], 7)]}


def test_models_run_without_torch(without_torch: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("resnet18", "bert_masked"):
        model, args = ZOO[name]()
        compiled = thresher.compile(settle(model), args, target="cpu", library="never")
        compiled.save(tmp_path / f"{name}.thresher")
        np.savez(tmp_path / f"{name}.npz", *[a.numpy() for a in args])
        wanted = torch.utils._pytree.tree_leaves(compiled(*args))
        printed = run(
            f"""
            import numpy as np, sys, thresher
            try:
                import torch
            except ModuleNotFoundError:
                print("no torch")
            model = thresher.load("{name}.thresher")
            assert model.validate() < 1e-4
            out = model(*np.load("{name}.npz").values())
            out = out if isinstance(out, (tuple, list)) else [out]
            np.savez("out.npz", *out)
            print(sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "networkx", "scipy")))
            """,
            without_torch,
            tmp_path,
        )
        assert printed.split("\n")[:2] == ["no torch", "[]"]
        for found, want in zip(np.load(tmp_path / "out.npz").values(), wanted, strict=True):
            np.testing.assert_array_equal(found, want.numpy())


def test_nesting_and_bad_arguments(tmp_path: Path) -> None:
    a, b, scale, x = (torch.randn(2, 3) for _ in range(4))
    model = Nested()
    compiled = thresher.compile(model, ((a, [b]),), {"scale": scale, "more": {"x": x}}, target="cpu")
    loaded = load(compiled.save(tmp_path / "nested.thresher"))
    given = (a.numpy(), [b.numpy()])
    named = {"scale": scale.numpy(), "more": {"x": x.numpy()}}
    found = loaded(given, **named)
    wanted = model((a, [b]), scale=scale, more={"x": x})
    assert found.keys() == wanted.keys() and found["parts"][1][1] == 7 and isinstance(found["parts"][1], tuple)
    np.testing.assert_allclose(found["sum"], wanted["sum"].numpy(), rtol=1e-5)
    for args, kwargs, words in (
        ((given,), {**named, "scale": scale.numpy()[:1]}, "argument 'scale' has shape"),
        ((given,), {**named, "scale": scale.double().numpy()}, "has dtype float64"),
        ((given,), {**named, "scale": 2.0}, "must be a tensor or a NumPy array, not float"),
        (((given[0], []),), named, r"\[0\]\[1\] must be a list of 1"),
        ((given,), {**named, "more": {"y": x.numpy()}}, "must be a dictionary of 'x'"),
        ((given,), {**named, "less": x.numpy()}, "takes no argument 'less'"),
        ((given,), {"scale": scale.numpy()}, "must be a dictionary of"),
    ):
        with pytest.raises(InputError, match=words):
            loaded(*args, **kwargs)


def test_what_needs_torch_says_so(tmp_path: Path) -> None:
    compiled = thresher.compile(nn.ReLU(), (torch.randn(3),), backend="eager")
    with pytest.raises(BackendError):
        compiled.save(tmp_path / "eager.thresher")


def test_containers_of_others_become_dictionaries() -> None:
    from torch.utils._pytree import tree_flatten, treespec_dumps

    spec = PyTree.read(treespec_dumps(tree_flatten({"a": (1, [2]), "b": 3})[1]))
    assert spec.assemble(iter([1, 2, 3])) == {"a": (1, [2]), "b": 3}
    other = PyTree.read(
        json.dumps(
            [
                1,
                {
                    "type": "x.Output",
                    "context": '["h"]',
                    "children_spec": [{"type": None, "context": None, "children_spec": []}],
                },
            ]
        )
    )
    assert other.assemble(iter([5])) == {"h": 5}
