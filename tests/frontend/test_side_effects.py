"""What forward changes in Python: a tensor of the model is state, what no later call reads does no harm, the rest is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.modules import Function
from thresher.errors import CaptureError
from thresher.frontend.capture import capture


class Holds(nn.Module):
    """A module with some attributes, and a forward that reads and changes them."""

    def __init__(self, forward: Callable[..., Any], **attributes: Any):
        super().__init__()
        self.function = forward
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.count = 0


def counts(m: Any, x: Tensor) -> Tensor:
    m.n += 1
    return x * m.n


def appends(m: Any, x: Tensor) -> Tensor:
    m.seen.append(x)
    return torch.stack(m.seen).sum(0)


def replaces_in_a_dictionary(m: Any, x: Tensor) -> Tensor:
    m.table["h"] = m.table["h"] + x
    return m.table["h"] * 2


def in_an_object(m: Any, x: Tensor) -> Tensor:
    m.cache.seen.append(x)
    m.cache.count += 1
    return x * m.cache.count


def first_call_only(m: Any, x: Tensor) -> Tensor:
    if m.started:
        return x
    m.started = True
    return x + 1


@pytest.mark.parametrize(
    ("forward", "attributes", "name"),
    [
        (counts, {"n": 1}, "n"),
        (appends, {"seen": []}, r"seen\[0\]"),
        (replaces_in_a_dictionary, {"table": {"h": torch.zeros(3)}}, r"table\['h'\]"),
        (in_an_object, {"cache": Cache()}, r"cache\.count"),
        (first_call_only, {"started": False}, "started"),
    ],
)
def test_what_later_calls_read_is_refused(forward: Callable, attributes: dict, name: str) -> None:
    model = Holds(forward, **attributes)
    before = copy.deepcopy(attributes)
    with pytest.raises(
        CaptureError, match=rf"the model changes {name}.*, and a call depends on what earlier calls left"
    ):
        capture(model, (torch.zeros(3),))
    for key, value in before.items():  # the model is as it was
        now = getattr(model, key)
        assert repr(vars(now)) == repr(vars(value)) if isinstance(now, Cache) else repr(now) == repr(value)


def remembers_the_size(m: Any, x: Tensor) -> Tensor:
    m.size, m.last = x.shape[0], x * 2
    return x + m.size


def makes_a_table_once(m: Any, x: Tensor) -> Tensor:
    """As rotary embeddings do."""
    if m.length < x.shape[0]:
        m.length, m.table = x.shape[0], torch.arange(float(x.shape[0]))
    return x + m.table[: x.shape[0]]


def counts_for_itself(m: Any, x: Tensor) -> Tensor:
    m.n += 1
    return x * 2


@pytest.mark.parametrize(
    ("forward", "attributes"),
    [
        (remembers_the_size, {"size": None, "last": None}),
        (makes_a_table_once, {"length": 0, "table": None}),
        (counts_for_itself, {"n": 0}),
    ],
)
def test_what_no_later_call_reads_does_no_harm(forward: Callable, attributes: dict) -> None:
    model, x = Holds(forward, **attributes), torch.randn(3)
    program = capture(model, (x,))
    assert {k: getattr(model, k) for k in attributes} == attributes and not program.state
    torch.testing.assert_close(program(x), model(x))


def test_a_pruned_weight_is_no_state() -> None:
    """torch.nn.utils.prune assigns it anew before every call."""
    layer = nn.utils.prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)
    program = capture(nn.Sequential(layer), (torch.randn(2, 4),))
    assert not program.state and not program.writes


def grown(m: Any, x: Tensor) -> Tensor:
    m.h = torch.cat([m.h, x])
    return m.h.sum()


def test_a_buffer_that_grows_is_refused() -> None:
    model = Holds(grown)
    model.register_buffer("h", torch.zeros(3))
    with pytest.raises(CaptureError, match=r"replaces its buffer 'h', torch.float32 \(3,\), by torch.float32 \(6,\)"):
        capture(model, (torch.zeros(3),))
    with pytest.raises(CaptureError, match=r"replaces its buffer 'h'"):  # a plain attribute, which counts as one
        capture(Holds(grown, h=torch.zeros(3)), (torch.zeros(3),))


def test_tensors_that_share_memory_are_refused() -> None:
    model = Holds(lambda m, x: (m.a.add_(1), m.b + x)[1])
    memory = torch.zeros(4)
    model.register_buffer("a", memory)
    model.register_buffer("b", memory[1:])
    with pytest.raises(CaptureError, match="its tensors 'a' and 'b' share memory"):
        capture(model, (torch.zeros(3),))


# ---------------------------------------------------------------------- containers of the caller


def puts(d: dict[str, Tensor]) -> Tensor:
    d["a"] = d["a"] * 2
    return d["a"] + d["b"]


def adds(d: dict[str, Tensor]) -> Tensor:
    d["c"] = d["a"] * 2
    return d["b"] * 1


def takes(d: dict[str, Tensor]) -> Tensor:
    return d.pop("a") + d["b"]


def returns(d: dict[str, Tensor]) -> dict[str, Tensor]:
    """A cache that goes in and comes out."""
    d["a"] = d["a"] + 1
    return d


def writes(d: dict[str, Tensor]) -> Tensor:
    d["a"].copy_(d["a"] * 2)
    return d["a"] + d["b"]


def pair() -> dict[str, Tensor]:
    return {"a": torch.ones(3), "b": torch.ones(3)}


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (puts, r"puts something into its argument at \[0\]\['a'\] that it does not return"),
        (adds, r"puts something into its argument at \[0\]\['c'\]"),
        (takes, r"removes its argument at \[0\]\['a'\]"),
    ],
)
def test_containers_of_the_caller_are_not_changed_without_a_word(function: Callable, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(Function(function), (pair(),))


def test_what_is_returned_or_written_is_there() -> None:
    program = capture(Function(returns), (pair(),))
    assert program(pair())["a"].tolist() == [2, 2, 2] and not program.writes
    program = capture(Function(writes), (pair(),))
    assert program.writes == (0,)


def test_free_sizes_that_turn_out_equal_are_no_change() -> None:
    a, b = torch.export.Dim("a", min=2), torch.export.Dim("a", min=2)
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    program = capture(Function(lambda x, y: x + y), (x, y), dynamic_shapes=(({0: a}, {0: b}),))
    assert torch.equal(program.run(x, y)[0], x + y)


def test_capture_leaves_the_elements_of_a_plain_tensor() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = Counting()
    calls = model.calls
    capture(model, (torch.randn(2, 3),))
    assert model.calls is calls and calls.tolist() == [0, 0, 0]


def test_an_operator_with_side_effects_is_named() -> None:
    def prints(m: Any, x: Tensor) -> Tensor:
        torch.ops.aten._print("x")
        return x + 1

    with pytest.raises(CaptureError, match=r"operators with side effects \(aten._print.default\)"):
        capture(Holds(prints).eval(), (torch.ones(2),))
