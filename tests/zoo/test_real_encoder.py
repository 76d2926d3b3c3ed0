"""A real text encoder made cheaper within a budget: MiniLM on English news."""

from __future__ import annotations

import pytest
import torch

import thresher
from thresher import Budget
from thresher.models.pretrained import digits, minilm, news


def test_within_one_percent_of_the_cosine() -> None:
    model, texts = minilm(), news(64, 16)
    compiled = thresher.compile(
        model,
        texts[0],
        passes=["exact", "sparse-attention{block=16,selected=false}"],
        calibration=texts[:10],
        budget=Budget(cosine=0.01),
    )
    assert all(c.passed for c in compiled.report.checks)
    if compiled.report.spent:  # it may not be faster on this machine, and is not kept then
        assert compiled.report.spent[0].held_out.bound <= 0.01
    with torch.no_grad():
        fresh = [float(1 - (compiled(*t) * model(*t)).sum()) for t in texts[10:]]
    assert sum(fresh) / len(fresh) <= 0.01


def test_budget_nothing_changes_nothing() -> None:
    model, texts = minilm(), news(64, 8)
    given = {"calibration": texts, "budget": Budget(cosine=0.0)}
    same = thresher.rewrite(model, texts[0], passes=["exact", "approximate"], **given)
    assert same.program.structurally_equal(thresher.rewrite(model, texts[0]).program)


def test_news_in_batches_has_padding() -> None:
    (tokens, mask), *_ = news(32, 2, batch=4)
    assert tokens.shape == mask.shape == (4, 32)
    assert mask.sum(1).tolist() == [32, 24, 16, 8]


def test_digits() -> None:
    images, classes = digits()
    assert images.shape == (5000, 1, 28, 28) and classes.bincount().tolist() == [500] * 10
    assert images.mean().item() == pytest.approx(0, abs=0.05) and images.std().item() == pytest.approx(1, abs=0.05)
