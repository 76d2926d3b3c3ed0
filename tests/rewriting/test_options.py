"""Options of passes: what is written is read back, for every pass and every value that it accepts, and a wrong value says which option."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thresher.errors import PassError
from thresher.rewriting.contract import Pass
from thresher.rewriting.options import read_options, write_options
from thresher.rewriting.registry import make_pass, registered_passes

BUILT_IN = {name: cls for name, cls in registered_passes().items() if cls.__module__.startswith("thresher.passes.")}
NUMBERS = st.integers(-2, 1 << 40) | st.floats(allow_nan=False)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = SCALARS | st.lists(SCALARS) | st.lists(SCALARS).map(tuple) | st.dictionaries(st.text(), st.integers())
#: Options whose default does not show all of the values that they accept, or whose text is one of a few names.
SPECIAL: dict[tuple[str, str], st.SearchStrategy] = {
    ("fold-vocabulary", "tokens"): st.none() | st.text() | st.lists(st.integers(0), min_size=1),
    ("threshold-activations", "kinds"): st.sampled_from(["number", "channel,top-k", "number + channel", "top-k"]),
    ("threshold-activations", "where"): st.sampled_from(["gate", "input,gate", "gate+input"]),
    ("reduce-tokens", "kinds"): st.sampled_from(["merge", "energy,received", "pagerank+merge"]),
}


def values_like(default: Any) -> st.SearchStrategy:
    """Return values of the type of ``default``, also such as an option refuses."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-2, 1 << 40)
    if isinstance(default, float):
        return NUMBERS
    if isinstance(default, tuple):
        items = st.integers(-1, 99) if isinstance(default[0], int) else NUMBERS
        return st.lists(items, max_size=4) | st.lists(items, max_size=4).map(tuple)
    return st.text()


def options_of(cls: type[Pass]) -> st.SearchStrategy[dict[str, Any]]:
    """Return options of a pass, some of them left out."""
    fields = {f.name: SPECIAL.get((cls.name, f.name), values_like(f.default)) for f in dataclasses.fields(cls)}
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_pass_is_what_its_text_says(name: str, data: st.DataObject) -> None:
    options = data.draw(options_of(BUILT_IN[name]))
    try:
        item = BUILT_IN[name](**options)
    except PassError as error:
        assert any(f"option {option!r} of pass {name!r}" in str(error) for option in options)
        return
    assert make_pass(str(item)) == item
    assert hash(item) == hash(make_pass(str(item)))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), VALUES))
def test_written_options_are_read_back(values: dict[str, Any]) -> None:
    text = write_options(values)
    assert read_options(text[1:-1]) == values


@pytest.mark.parametrize(
    "text", ["inf", "nan", "true", "None", "a,b", "a{b}", "it's", '"', "\\", "1", "", " a", "a\\'b,", "(a"]
)
def test_words_that_look_like_something_else_are_read_back(text: str) -> None:
    assert read_options(write_options({"word": text, "other": (text, 1)})[1:-1]) == {"word": text, "other": (text, 1)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
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
        ("fold-vocabulary", {"min_removed": 2}, "a fraction of the rows, from 0 to 1"),
        ("drop-sublayers", {"speed": 0.5}, "a factor above 1, or 0 for what the budget allows"),
        ("select-neurons", {"block": 0}, "a number of neurons, from 1 on"),
        ("threshold-activations", {"kinds": "number+best"}, "some of number, channel, top-k, joined by plus signs"),
        ("threshold-activations", {"where": "weight"}, "some of gate, input, joined by plus signs"),
        ("threshold-activations", {"density": 2}, "a fraction of the elements, or 0 for what the budget allows"),
        ("reduce-tokens", {"kinds": ""}, "some of merge, energy, received, pagerank, joined by plus signs"),
        ("reduce-tokens", {"every": -1}, "a number of tokens, or 0 for no uniform sample"),
        ("reduce-tokens", {"protected": -2}, "a number of tokens, or -1 for those that are read by their position"),
    ],
)
def test_a_wrong_value_names_the_option(name: str, options: dict[str, Any], message: str) -> None:
    """By the class and by its text."""
    (option,) = options
    for make in (lambda: BUILT_IN[name](**options), lambda: make_pass(name + write_options(options))):
        with pytest.raises(PassError, match=f"option {option!r} of pass {name!r} .*{message}"):
            make()
