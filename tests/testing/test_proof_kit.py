"""The proof kit sees what is wrong with a pass, and nothing where nothing is."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn

import thresher
from helpers.cases.canonicalize import computed
from helpers.planted import PLANTED
from helpers.planted_merge import BEGINNERS, FAULTS, MergeParallel
from thresher.errors import PassError
from thresher.rewriting.contract import Pass
from thresher.testing import (
    ZOO,
    Case,
    Entry,
    IndexMapError,
    before_after,
    examine,
    near_misses,
    prove,
    prove_same_map,
    refused,
    replay,
)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_defects_are_caught(name: str) -> None:
    """Each by the check, and in the words, that say what is wrong: not by luck."""
    item, case, check, words = PLANTED[name]
    only = {"misses": 60 if check == "near miss" else 0, **({} if check == "dtypes" else {"dtypes": ()})}
    findings = examine(item, case, draws=2, every=True, **only)
    assert any(f.check == check and words in f.message for f in findings), findings


def test_enough_are_planted() -> None:
    assert len(PLANTED) >= 30


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_case_as_a_beginner_writes_it_finds_every_fault(fault: str) -> None:
    """And none in the pass that is right."""
    findings = examine(MergeParallel(fault), BEGINNERS)
    assert bool(findings) == bool(fault), findings


def test_a_case_that_tests_nothing_is_named() -> None:
    idle = Case("no norm", lambda n: (nn.Linear(3, 4), (torch.randn(n, 3),)), n=(1, 2))
    (finding,) = examine("fold-batch-norm", idle)
    assert finding.check == "idle" and "rewrote nothing" in finding.message
    with pytest.raises(AssertionError, match="idle: no norm"):
        prove("fold-batch-norm", idle)


def test_a_parameter_that_leads_back_to_none_is_named_where_all_must() -> None:
    """The square of a weight has no way back: its sign is gone."""
    case = Case("squared", computed, kind=("squared",), n=(2,))
    (finding,) = examine("evaluate-constants", Entry(case, restored=True, misses=0), dtypes=())
    assert (
        finding.check == "way back"
        and "'mul' leads back to no parameter of the model: leave a Restore" in finding.message
    )
    assert not examine("evaluate-constants", Entry(case, misses=0), dtypes=())


def test_an_entry_has_options_for_a_name_only() -> None:
    entry = Entry(Case("one", lambda: (nn.ReLU(), (torch.randn(2),))), "{limit=5}")
    assert str(entry.configured("evaluate-constants")) == "evaluate-constants{limit=5}"
    with pytest.raises(
        PassError, match=r"has the options \{limit=5\}: name the pass without any, not evaluate-constants\{limit=3\}"
    ):
        entry.configured("evaluate-constants{limit=3}")


def test_draws_have_every_pair_of_values() -> None:
    case = Case("sizes", lambda **sizes: None, a=(1, 2, 3), b=("x", "y"), c=(True, False), d=(None, [1]))
    draws = list(case.draws())
    assert draws[0] == {"a": 1, "b": "x", "c": True, "d": None} and draws[1] == {"a": 3, "b": "y", "c": False, "d": [1]}
    assert 6 <= len(draws) <= 8  # of 24
    for one, other in itertools.combinations(case.sizes, 2):
        wanted = len(case.sizes[one]) * len(case.sizes[other])
        assert len({(repr(d[one]), repr(d[other])) for d in draws}) == wanted
    assert draws == list(case.draws()) and list(case.draws(2)) == draws[:2]


def test_a_value_that_never_meets_a_rewrite_is_named() -> None:
    def build(kind: str, n: int) -> tuple[nn.Module, tuple]:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if kind == "norm" else nn.ReLU()), (
            torch.randn(n, 3, 5, 5),
        )

    sizes = {"kind": ("norm", "relu"), "n": (1, 2)}
    (finding,) = examine("fold-batch-norm", Case("kinds", build, **sizes))
    assert finding.check == "unmet" and "kind=relu: no rewrite seen; if that is meant, say Case(" in finding.message
    prove("fold-batch-norm", Case("kinds", build, refused={"kind": ("relu",)}, **sizes))
    (finding,) = examine("fold-batch-norm", Case("kinds", build, refused={"kind": ("norm", "relu")}, **sizes))
    assert "kind=norm is said to be refused, and was rewritten" in finding.message


def test_a_way_back_is_judged_parameter_by_parameter() -> None:
    """One without a way back hides no other, and the wrong one is named."""
    findings = examine(MergeParallel(FAULTS[-1]), BEGINNERS, misses=0, dtypes=())
    assert [f.check for f in findings] == ["way back"] and "where 'wide.weight" in findings[0].message


def test_before_after_and_refusals() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    found = before_after("fold-batch-norm", model, (torch.randn(1, 3, 5, 5),))
    assert found.changed and "-  %getitem" in found.diff and "rewrote" in str(found)
    kept = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert not refused("fold-batch-norm", kept, (torch.randn(1, 3, 5, 5),)).changed
    with pytest.raises(AssertionError, match="should have refused"):
        refused("fold-batch-norm", model, (torch.randn(1, 3, 5, 5),))
    with pytest.raises(AssertionError, match="no refusal matches 'padding'"):
        refused("fold-batch-norm", kept, (torch.randn(1, 3, 5, 5),), match="padding")


def test_near_misses_are_one_step_away() -> None:
    program = thresher.capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval(), (torch.randn(2, 3),))
    found = dict(near_misses(program))
    assert len(found) == len(set(found)) > 5
    for words, other in found.items():
        assert not program.structurally_equal(other) or "number" in words or "used in the place" in words, words
        other.verify()
    expanded, transposed = (
        found["linear is one slice along dimension 0, expanded"],
        found["input_1 is the transpose of an input"],
    )
    assert "aten.expand.default(%slice_tensor, [2, 4])" in expanded.text() and transposed.probe[0].shape == (3, 2)
    torch.testing.assert_close(transposed(program.probe[0].T.contiguous()), program(program.probe[0]))
    assert list(dict(near_misses(program))) == list(found)  # the same each time
    assert len(list(near_misses(program, limit=3))) == 3


def test_index_maps() -> None:
    """Channels of a grouped layer by (group, place): equal; by (place, group): the counterexample is named."""

    def shape(groups: int, width: int) -> tuple[int]:
        return (groups * width,)

    sizes = {"groups": (1, 2, 4), "width": (1, 3, 8)}
    by_group = lambda c, groups, width: (c // width) * width + c % width  # noqa: E731
    by_place = lambda c, groups, width: (c % width) * groups + c // width  # noqa: E731
    assert prove_same_map(lambda c, groups, width: c, by_group, sizes, shape) == 9
    with pytest.raises(IndexMapError, match=r"with \{'groups': 2, 'width': 3\} the element at \[\d\] is read from"):
        prove_same_map(lambda c, groups, width: c, by_place, sizes, shape)
    with pytest.raises(IndexMapError, match="no combination"):
        prove_same_map(by_group, by_group, sizes, shape, where=lambda groups, width: False)


def test_index_maps_are_what_torch_does() -> None:
    """Permuting the dimensions of a reshape: proven, and the same on a tensor."""
    a, b, c = 2, 3, 4
    prove_same_map(
        lambda k, i, j, **_: (i, j, k),
        lambda k, i, j, a, b, c: (
            ((i * b + j) * c + k) // (b * c),
            ((i * b + j) * c + k) // c % b,
            ((i * b + j) * c + k) % c,
        ),
        {"a": (1, 2, 5), "b": (1, 3), "c": (2, 4)},
        lambda a, b, c: (c, a, b),
    )
    x = torch.arange(a * b * c).reshape(a, b, c)
    assert torch.equal(
        x.permute(2, 0, 1).flatten(), torch.stack([x[i, j, k] for k in range(c) for i in range(a) for j in range(b)])
    )


def test_replay_names_the_models_that_changed() -> None:
    zoo = {name: ZOO[name] for name in ("lista", "vit", "mobilenet")}
    old, new = replay("evaluate-constants", zoo=zoo), replay("evaluate-constants", "fold-batch-norm", zoo=zoo)
    assert {name for name in zoo if old[name].digest != new[name].digest} == {"mobilenet"}
    assert new["mobilenet"].rewrites > 0 and all(r.error < 1e-9 for r in new.values())


def test_what_a_pass_raises_is_said() -> None:
    class Raises(Pass):
        name = "raises"

        def apply(self, program, context):
            raise KeyError("weight")

    (raised, idle) = examine(Raises(), Case("identity", lambda: (nn.Tanh(), (torch.randn(2),))))
    line = inspect.getsourcelines(Raises.apply)[1] + 1
    assert raised.message == f"KeyError: 'weight' ({__file__}:{line})" and idle.check == "idle"
