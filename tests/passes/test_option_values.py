"""The options of each pass: their defaults are those of its page, the last value that they accept is accepted, the next one is not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.registered import OWN
from thresher.errors import PassError
from thresher.rewriting.options import write_options
from thresher.rewriting.registry import make_pass, registered_passes

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"


@pytest.mark.parametrize("name", OWN)
def test_defaults_are_those_of_the_page(name: str) -> None:
    _, _, section = PAGE.read_text().partition(f"\n### {name}\n")
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section.partition("\n### ")[0], re.M)
    defaults = {f.name: write_options({f.name: f.default}) for f in dataclasses.fields(registered_passes()[name])}
    assert {option: f"{{{option}={value}}}" for option, value in rows} == defaults


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("pool-keys", {"factors": (2, 1)}, "numbers of keys from 2 on, not"),
    ("pool-keys", {"factors": 2}, "takes a tuple of int, not 2"),
    ("pool-values", {"windows": (4,)}, "odd numbers of tokens, or 0 for all of them"),
    ("pyramid-attention", {"factor": 1}, "a number of keys from 2 on"),
    ("pyramid-attention", {"block": -1}, "a number of keys, or 0 for one by the length"),
    ("sparse-attention", {"block": -16}, "a number of tokens, or 0 for one by the length, not -16"),
    ("sparse-attention", {"static": 1}, "takes a bool, not 1"),
    ("skip-masked-blocks", {"max_remaining_cost": -0.1}, "a fraction of the dense cost, from 0 on"),
    ("skip-small-weights", {"skips": [0.0]}, r"positive numbers s, of weights under exp\(-s\)"),
    ("evaluate-constants", {"limit": -1}, "a number of elements, from 0 on"),
    ("evaluate-constants", {"limit": 1.5}, "takes an int, not 1.5"),
    ("fold-channels", {"round_to": -1}, "a number of channels, or 0 for the target's tile"),
    ("fold-channels", {"slack": -1.0}, "a fraction of the channels, from 0 on"),
    ("fold-channels", {"min_improvement": -1}, "a factor from 0 on"),
    ("fold-channels", {"slack": float("nan")}, "takes a float, not nan"),
    ("permute-channels", {"min_improvement": -1}, "a factor from 0 on"),
    ("fold-vocabulary", {"tokens": [-1]}, "numbers from 0 on, or a file with one number a line"),
    ("fold-vocabulary", {"tokens": 7}, "numbers from 0 on, or a file with one number a line"),
    ("fold-vocabulary", {"input": 0}, "takes a str, not 0"),
    ("fold-vocabulary", {"tokens": []}, "numbers from 0 on, or a file with one number a line"),
    ("fold-vocabulary", {"tokens": ["a"]}, "numbers from 0 on, or a file with one number a line"),
    ("fold-vocabulary", {"min_removed": -0.1}, "a fraction of the rows, from 0 to 1"),
    ("fold-vocabulary", {"min_removed": 1.1}, "a fraction of the rows, from 0 to 1"),
    ("drop-sublayers", {"speed": 1.0}, "a factor above 1, or 0 for what the budget allows"),
    ("drop-sublayers", {"speed": 0.5}, "a factor above 1, or 0 for what the budget allows"),
    ("select-neurons", {"block": 0}, "a number of neurons, from 1 on"),
    ("threshold-activations", {"kinds": "number+best"}, "some of number, channel, top-k, joined by plus signs"),
    ("threshold-activations", {"where": "weight"}, "some of gate, input, joined by plus signs"),
    ("threshold-activations", {"density": -0.1}, "a fraction of the elements, or 0 for what the budget allows"),
    ("threshold-activations", {"density": 1.1}, "a fraction of the elements, or 0 for what the budget allows"),
    ("reduce-tokens", {"kinds": ""}, "some of merge, energy, received, pagerank, joined by plus signs"),
    ("reduce-tokens", {"every": -1}, "a number of tokens, or 0 for no uniform sample"),
    ("reduce-tokens", {"protected": -2}, "a number of tokens, or -1 for those that are read by their position"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_value_names_the_option(name: str, options: dict[str, Any], message: str) -> None:
    """By the class and by its text."""
    (option,) = options
    for make in (lambda: registered_passes()[name](**options), lambda: make_pass(name + write_options(options))):
        with pytest.raises(PassError, match=f"option {option!r} of pass {name!r} .*{message}"):
            make()


#: The least and the largest values, by pass.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("pool-keys", {"factors": (2,)}),
    ("pool-values", {"windows": (0, 1)}),
    ("pyramid-attention", {"factor": 2, "block": 0}),
    ("sparse-attention", {"block": 1}),
    ("skip-masked-blocks", {"max_remaining_cost": 0.0}),
    ("skip-small-weights", {"skips": (0.5,)}),
    ("evaluate-constants", {"limit": 0}),
    ("fold-channels", {"round_to": 0, "slack": 0.0, "min_improvement": 0.0}),
    ("permute-channels", {"min_improvement": 0.0}),
    ("fold-vocabulary", {"tokens": (0,), "min_removed": 0.0}),
    ("fold-vocabulary", {"tokens": "tokens.txt", "min_removed": 1.0}),
    ("drop-sublayers", {"speed": 0.0}),
    ("drop-sublayers", {"speed": 1.5}),
    ("select-neurons", {"block": 1}),
    ("threshold-activations", {"density": 0.0}),
    ("threshold-activations", {"density": 1.0}),
    ("reduce-tokens", {"every": 0, "protected": -1}),
]


@pytest.mark.parametrize(("name", "options"), ACCEPTED)
def test_the_least_and_the_largest_value_are_accepted(name: str, options: dict[str, Any]) -> None:
    item = registered_passes()[name](**options)
    assert {option: getattr(item, option) for option in options} == options
