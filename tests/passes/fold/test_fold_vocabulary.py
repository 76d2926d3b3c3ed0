"""fold-vocabulary: equal rows once, rows that do not occur not at all, ties respected."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thresher
from helpers.modules import Function
from helpers.refusals import Build, check_refusal
from helpers.rewrites import check_rewrite
from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.program import Program, Role
from thresher.passes.fold.fold_vocabulary import FoldVocabulary
from thresher.rewriting.contract import Context

TOKENS = torch.tensor([[3, 7, 0, 11], [5, 3, 3, 19]])


class Reader(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.kinds = nn.Embedding(20, 6), nn.Embedding(2, 6)
        self.head = nn.Linear(6, 20, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, kinds: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(tokens) + self.kinds(kinds)))


ARGS = (TOKENS, torch.zeros_like(TOKENS))


def trimmed(model: nn.Module) -> nn.Module:
    """Tokens 4 to 15 but 7 and 11 look like token 3, tokens 16 to 18 are zero."""
    with torch.no_grad():
        model.words.weight[[4, 5, 6, 8, 9, 10, 12, 13, 14, 15]] = model.words.weight[3].clone()
        model.words.weight[16:19] = 0
    return model.eval()


def test_equal_rows_are_stored_once() -> None:
    model = trimmed(Reader())
    small = thresher.rewrite(model, ARGS)
    assert small.program.constants["words.weight_1"].shape == (20 - 10 - 2, 6)
    everything = torch.arange(20).reshape(2, 10)[:, :4], torch.zeros(2, 4, dtype=torch.int64)
    for args in (ARGS, everything, (torch.arange(16, 20).repeat(2, 1), torch.ones(2, 4, dtype=torch.int64))):
        assert torch.equal(small(*args), model(*args))
    compiled = thresher.compile(model, ARGS, target="cpu")
    assert torch.allclose(compiled(*everything), model(*everything), atol=1e-6)
    assert all(torch.equal(v, small.unfold()[k]) for k, v in model.state_dict().items())


def test_a_vocabulary_without_copies_stays() -> None:
    program = capture(Reader().eval(), ARGS)
    assert FoldVocabulary().apply(program, Context()).program is program


def test_only_tokens_that_occur(tmp_path) -> None:
    model = Reader().eval()
    program = capture(model, ARGS)
    listed = tmp_path / "tokens.txt"
    listed.write_text("0\n3\n5\n7\n11\n19\n")
    for tokens in ([0, 3, 5, 7, 11, 19], str(listed)):
        small = FoldVocabulary(tokens=tokens).apply(program, Context()).program.verify()
        assert sorted(tuple(t.shape) for t in small.constants.values()) == [(2, 6), (6, 6), (20,), (20, 6)]
        assert torch.equal(small(*ARGS), model(*ARGS))


def test_tokens_that_do_not_occur_read_the_first_that_does() -> None:
    program = FoldVocabulary(tokens=[3, 0, 5, 7, 11, 19]).apply(capture(Reader().eval(), ARGS), Context()).program
    (name,) = (name for name, value in program.constants.items() if value.shape == (20,))
    assert program.role(name) is Role.BUFFER
    assert program.constants[name].tolist() == [0, 0, 0, 1, 0, 2, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 5]


class Both(nn.Module):
    """A short, wide table that is read first, and two longer ones of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.words, self.places = nn.Embedding(4, 30), nn.Embedding(20, 6), nn.Embedding(24, 6)

    def forward(self, kinds: Tensor, tokens: Tensor) -> Tensor:
        return self.kinds(kinds)[..., :6] + self.words(tokens) * self.places(tokens)


def shortened(item: FoldVocabulary, model: nn.Module, *args: Tensor) -> list[int]:
    """Return the lengths of the tables after the pass, in the order of the calls."""
    program = item.apply(capture(model.eval(), args), Context()).program.verify()
    return [len(program.constants[n.args[0].target]) for n in program.calls(torch.ops.aten.embedding.default)]


def test_the_input_that_tokens_are_meant_for() -> None:
    """The named one, or the one that reads the longest table; all of its tables."""
    kinds, words = torch.tensor([[0, 2]]), torch.tensor([[5, 9]])
    assert shortened(FoldVocabulary(tokens=[5, 9]), Both(), kinds, words) == [4, 2, 2]
    assert shortened(FoldVocabulary(tokens=[5, 9], input="tokens"), Both(), kinds, words) == [4, 2, 2]
    assert shortened(FoldVocabulary(tokens=[0, 2], input="kinds"), Both(), kinds, words) == [2, 20, 24]
    with pytest.raises(PassError, match="from 0 to 19, at least one"):
        shortened(FoldVocabulary(tokens=[5, 9, 20]), Both(), kinds, words)


def test_a_fraction_of_the_rows_must_go() -> None:
    """Ten rows of twenty."""
    row = nn.Embedding(20, 6)
    with torch.no_grad():
        row.weight[10:] = row.weight[0].clone()
    tokens = torch.tensor([[0, 1]])
    assert shortened(FoldVocabulary(min_removed=0.5), row, tokens) == [10]
    assert shortened(FoldVocabulary(min_removed=0.51), row, tokens) == [20]


def test_zeros_are_one_row_also_where_they_are_not_the_last() -> None:
    row = nn.Embedding(6, 3)
    with torch.no_grad():
        row.weight[[1, 4]] = 0
        row.weight[5] = -row.weight[5].abs()
    assert shortened(FoldVocabulary(), row, torch.tensor([[0, 1]])) == [5]


def test_a_table_that_is_computed_and_tokens_that_are() -> None:
    table = Function(
        lambda tokens, scale, layer: torch.nn.functional.embedding(tokens, layer.weight * scale), nn.Embedding(6, 3)
    )
    assert (
        FoldVocabulary().apply(capture(table.eval(), (torch.tensor([[0, 1]]), torch.ones(()))), Context()).rewrites
        == []
    )
    moved = Function(lambda tokens, layer: layer(tokens + 1), nn.Embedding(6, 3))
    with pytest.raises(PassError, match=r"no embedding reads an input$"):
        FoldVocabulary(tokens=[1]).apply(capture(moved.eval(), (torch.tensor([[0, 1]]),)), Context())


@pytest.mark.parametrize(
    ("text", "message"), [("", "at least one"), ("-1 3", "from 0 to 19"), ("3.5", "cannot read the tokens")]
)
def test_bad_files(text: str, message: str, tmp_path) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(PassError, match=message):
        FoldVocabulary(tokens=str(tmp_path / "tokens")).apply(capture(Reader().eval(), ARGS), Context())


def test_tied_rows_stay_and_say_why() -> None:
    result = FoldVocabulary().apply(capture(trimmed(Reader(tied=True)), ARGS), Context())
    assert result.rewrites == []
    assert result.refusals[0].message == "12 rows kept: held by linear"
    program = capture(trimmed(Reader()), ARGS)
    program.constants["copy"] = program.constants["words.weight"]
    (refusal,) = FoldVocabulary().apply(program, Context()).refusals
    assert refusal.message == "12 rows kept: held by copy"


def test_dynamic_tokens_stay_and_say_why() -> None:
    """No size of the example may find its way into the graph."""
    model, batch = trimmed(Reader()), torch.export.Dim("batch", max=64)
    small = thresher.rewrite(model, ARGS, dynamic_shapes=({0: batch}, {0: batch}))
    others = torch.arange(20).reshape(5, 4), torch.ones(5, 4, dtype=torch.int64)
    assert torch.allclose(small(*others), model(*others), atol=1e-6)
    program = capture(model, ARGS, dynamic_shapes=({0: batch}, {0: batch}))
    result = FoldVocabulary().apply(program, Context())
    assert result.program is program
    assert "the shape of the tokens is dynamic" in result.refusals[0].message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [0, 3, 5]}, r"the example's tokens holds \[7, 11, 19\]"),
        ({"tokens": [0, 3, 5, 7, 11, 19, 20]}, "from 0 to 19"),
        ({"tokens": [0], "input": "words"}, "no embedding reads an input 'words'"),
        ({"tokens": "/nowhere/tokens.txt"}, "cannot read the tokens"),
    ],
)
def test_bad_tokens(options: dict, message: str) -> None:
    with pytest.raises(PassError, match=message):
        FoldVocabulary(**options).apply(capture(Reader().eval(), ARGS), Context())


BEFORE = """\
program model {
  %tokens = input : i64[2, 5]
  %words = constant "words" : f32[6, 3]
  %y = aten.embedding.default(%words, %tokens) : f32[2, 5, 3]
  return [%y]
}
"""
AFTER = """\
program model {
  %tokens = input : i64[2, 5]
  %words_1 = constant "words_1" : f32[4, 3]
  %words_place = constant "words_place" : i64[6]
  %reshape = aten.reshape.default(%tokens, [-1]) : i64[10]
  %index_select = aten.index_select.default(%words_place, 0, %reshape) : i64[10]
  %reshape_1 = aten.reshape.default(%index_select, [2, 5]) : i64[2, 5]
  %embedding = aten.embedding.default(%words_1, %reshape_1) : f32[2, 5, 3]
  return [%embedding]
}
"""


def test_before_and_after() -> None:
    check_rewrite(
        "fold-vocabulary",
        BEFORE,
        AFTER,
        constants={"words": torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 3.0])[:, None].repeat(1, 3)},
    )


def dynamic() -> Program:
    batch = torch.export.Dim("batch", max=64)
    return capture(trimmed(Reader()), ARGS, dynamic_shapes=({0: batch}, {0: batch}))


REFUSALS = [
    ("rows kept: the shape of the tokens is dynamic", dynamic),
    ("* rows kept: held by *", lambda: (trimmed(Reader(tied=True)), *ARGS)),
]


@pytest.mark.parametrize(("sentence", "build"), REFUSALS)
def test_refusals(sentence: str, build: Build) -> None:
    check_refusal("fold-vocabulary", sentence, build)
