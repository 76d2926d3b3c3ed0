"""The tests of operators and models that come with ONNX: each is computed as its stored outputs say, or refused for a reason of these."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from benchmarks.conformance.suites.onnx_nodes import node_tests
from helpers.onnx_cases import (
    DATA,
    StoredTest,
    difference,
    light_model_test,
    stored_model_tests,
    stored_node_test,
    with_constants,
)
from thresher.errors import CaptureError
from thresher.frontend.onnx.values import Unsupported

#: Why a test is refused, and which ones may be.
REASONS = {
    "STRING|String": "label_encoder_(string|tensor)|string|strnorm|regex_full_match",
    "RandomUniformLike": "bernoulli",
    "which is random": "training_dropout",
    "ImageDecoder": "image_decoder",
    "Gradient": "gradient",
}
SHARDS = 8


def judged(name: str, tests: list[StoredTest]) -> str:
    """Return what is wrong with the result of a test, "" where nothing is."""
    for test in tests:
        _, _, result = with_constants(test)
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(test.outputs):
            return f"{name}: {len(results)} outputs instead of {len(test.outputs)}"
        for expected, actual in zip(test.outputs, results):
            if wrong := difference(expected, actual, test.rtol):
                return f"{name}: {wrong}"
    return ""


def refused_for_a_reason(name: str, error: Exception) -> bool:
    return any(re.search(reason, str(error)) and re.search(names, name) for reason, names in REASONS.items())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_operators(shard: int) -> None:
    wrong = []
    for name in itertools.islice(node_tests(), shard, None, SHARDS):
        try:
            wrong.append(judged(name, [stored_node_test(name)]))
        except (CaptureError, Unsupported) as error:
            wrong.append("" if refused_for_a_reason(name, error) else f"{name}: {error}")
    assert not [w for w in wrong if w]


#: Those of the light models whose outputs are not decided by rounding: the logits of the other five grow to 1e12 and more.
LIGHT = ["densenet121", "inception_v2", "shufflenet", "squeezenet"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_models(name: str) -> None:
    assert not judged(name, [light_model_test(DATA / "light" / f"light_{name}.onnx")])


FOLDERS = sorted(
    p.parent for kind in ("simple", "pytorch-operator", "pytorch-converted") for p in DATA.glob(f"{kind}/*/model.onnx")
)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_models(folder: Path) -> None:
    try:
        assert not judged(folder.name, stored_model_tests(folder))
    except (CaptureError, Unsupported) as error:
        assert refused_for_a_reason(folder.name, error), error
