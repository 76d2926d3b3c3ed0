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
