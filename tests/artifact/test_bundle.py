"""Several models in one artifact: weights once, each entry itself, on the command line and where torch is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import thresher
from thresher.artifact import numpy_reader
from thresher.cli.main import main
from thresher.errors import ArtifactError


@pytest.fixture(scope="module")
def pair() -> dict[str, thresher.Compiled]:
    """One model for sixteen rows, and for one; alone, the second would pack its weights in another order. Its activation makes no zeros: a
    layer that skips them keeps its weight in a layout of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    many = thresher.compile(model, (torch.randn(16, 256),), target="cpu")
    return {"many": many, "one": thresher.compile(model, (torch.randn(1, 256),), target="cpu", share=many)}


@pytest.fixture(scope="module")
def bundle(pair: dict[str, thresher.Compiled], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return thresher.Bundle(pair).save(tmp_path_factory.mktemp("bundle") / "b.thresher")


def test_each_entry_is_the_model(pair: dict[str, thresher.Compiled], bundle: Path) -> None:
    loaded = thresher.load(bundle)
    assert isinstance(loaded, thresher.Bundle) and list(loaded) == ["many", "one"]
    for name, rows in (("many", 16), ("one", 1)):
        x = torch.randn(rows, 256)
        assert torch.equal(loaded[name](x), pair[name](x))
    assert all(check.passed for checks in loaded.validate().values() for check in checks)
    with pytest.raises(KeyError, match="'two'; this bundle has many, one"):
        loaded["two"]


def test_weights_are_stored_and_held_once(pair: dict[str, thresher.Compiled], bundle: Path, tmp_path: Path) -> None:
    alone = pair["many"].save(tmp_path / "many.thresher").stat().st_size
    assert bundle.stat().st_size < 1.15 * alone
    loaded = thresher.load(bundle)
    held = [{t.data_ptr() for t in map(torch.from_dlpack, m.executable.module.weights)} for m in loaded.values()]
    assert held[0] == held[1] and len(held[0]) == 4


def test_where_torch_is_not(pair: dict[str, thresher.Compiled], bundle: Path) -> None:
    loaded = numpy_reader.load(bundle)
    x = torch.randn(1, 256)
    np.testing.assert_array_equal(loaded["one"](x.numpy()), pair["one"](x).numpy())
    assert all(error < 1e-4 for error in loaded.validate().values())


def test_a_loaded_model_is_saved_again(bundle: Path, tmp_path: Path) -> None:
    one = thresher.load(bundle)["one"].save(tmp_path / "one.thresher")
    x = torch.randn(1, 256)
    assert torch.equal(thresher.load(one)(x), thresher.load(bundle)["one"](x))


def test_on_the_command_line(pair: dict[str, thresher.Compiled], bundle: Path, tmp_path: Path, capsys) -> None:
    parts = [f"{name}={model.save(tmp_path / f'{name}.thresher')}" for name, model in pair.items()]
    out = tmp_path / "both.thresher"
    assert main(["bundle", *parts, "-o", str(out)]) == 0
    assert main(["diff", str(out), str(bundle)]) == 0
    assert capsys.readouterr().out.strip().endswith("no difference")
    assert main(["validate", str(out)]) == 0 and main(["bench", str(out), "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{out}[many]") == 2 and printed.count(f"{out}[one]") == 2
    assert main(["diff", str(out), str(tmp_path / "one.thresher")]) == 1
    assert "only in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a=missing.thresher"], "missing.thresher does not exist"),
        (["a={one}", "a={one}"], "two models are named 'a'"),
        (["a-b={one}"], "'a-b' cannot name a model"),
        (["both={bundle}"], "holds 2 models"),
    ],
)
def test_what_cannot_be_bundled(
    pair: dict[str, thresher.Compiled], bundle: Path, tmp_path: Path, capsys, arguments: list[str], words: str
) -> None:
    one = pair["one"].save(tmp_path / "one.thresher")
    given = [a.format(one=one, bundle=bundle) for a in arguments]
    assert main(["bundle", *given, "-o", str(tmp_path / "out.thresher")]) == 1
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["one.thresher"]


def test_nothing_to_bundle() -> None:
    with pytest.raises(ArtifactError, match="at least one"):
        thresher.Bundle({})
