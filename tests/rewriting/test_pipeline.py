"""A pass of one's own at a place in a pipeline: in Python, as text, and on the command line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thresher
from thresher.cli.arguments import passes as split
from thresher.cli.main import main
from thresher.errors import PassError
from thresher.passes import pipelines
from thresher.passes.canonicalize.simplify import Simplify
from thresher.passes.fold.fold_vocabulary import FoldVocabulary
from thresher.rewriting.pipeline import Pipeline


def names(pipeline: Pipeline | list) -> list[str]:
    return [p.name for p in pipeline]


def test_places() -> None:
    """Before the first pass of a name, after the last; the pipeline itself stays as it is."""
    row = pipelines.canonicalize
    whole = names(row)
    changed = names(row.before("evaluate-constants", FoldVocabulary()))
    assert changed == ["fold-vocabulary", *whole]
    last = len(whole) - whole[::-1].index("evaluate-constants")
    assert names(row.after("evaluate-constants", "fold-vocabulary")) == [
        *whole[:last],
        "fold-vocabulary",
        *whole[last:],
    ]
    assert names(row.without("evaluate-constants", "simplify")) == [
        n for n in whole if n not in ("evaluate-constants", "simplify")
    ]
    assert names(row) == whole and isinstance(row.without("simplify"), Pipeline)


@pytest.mark.parametrize("change", [lambda p: p.before("fold-norm", "simplify"), lambda p: p.without("fold-norm")])
def test_a_name_that_is_not_there(change) -> None:
    with pytest.raises(
        PassError, match="there is no 'fold-norm' in this pipeline; it has evaluate-constants, complex-num"
    ):
        change(pipelines.exact)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("exact", pipelines.exact),
        ("exact.without(simplify)", pipelines.exact.without("simplify")),
        ("exact.before(fold-scale, simplify)", pipelines.exact.before("fold-scale", Simplify())),
        (
            "canonicalize.after(simplify,fold-channels{round_to=1,slack=0.5}, fold-vocabulary).without(complex-numbers)",
            pipelines.canonicalize.after("simplify", "fold-channels{round_to=1,slack=0.5}", FoldVocabulary()).without(
                "complex-numbers"
            ),
        ),
    ],
)
def test_text_is_the_same(text: str, expected: Pipeline) -> None:
    assert pipelines.resolve(text) == list(expected)
    assert pipelines.resolve([text, "simplify"]) == [*expected, "simplify"]
    assert [p for item in split(text) for p in pipelines.resolve(item)] == list(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exact.beside(simplify)", r"cannot read 'exact.beside\(simplify\)'; write exact.before\(PASS, NEW\)"),
        ("exact.before(fold-scale)", "needs the name of a pass, and what is to run beside it"),
        ("exact.without()", "needs the name of a pass"),
        ("exact.before(fold-scale, fold-chanels)", "unknown pass 'fold-chanels'; did you mean 'fold-channels'"),
    ],
)
def test_text_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        pipelines.resolve(text)


def test_it_is_a_pipeline_for_compile() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3)
    report = thresher.compile(model, (x,), passes=pipelines.exact.without("fold-channels"), backend="eager").report
    assert "fold-channels" not in names(report.passes) and "fold-scale" in names(report.passes)


def test_the_graph_between_passes(capsys: pytest.CaptureFixture, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shown.py").write_text(
        "import torch\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()\n"
        "    return model, (torch.randn(1, 3, 5, 5),)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["passes", "--graph", "exact.without(fold-channels)", "shown:make"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# as captured\nprogram Sequential {") and "# after fold-scale: skipped" in shown
    step = shown[shown.index("# after fold-batch-norm: changed") : shown.index("# after fold-scale")]
    assert "#   1: folded into conv2d" in step and "-  %getitem" in step
    assert main(["passes", "--graph", "exact"]) == 1
    assert "--graph needs a MODEL" in capsys.readouterr().err
