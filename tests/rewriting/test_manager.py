"""The pass contract: what the manager checks, reverts, reports, skips and dumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from thresher.errors import PassError
from thresher.frontend.capture import capture
from thresher.ir.program import Program
from thresher.rewriting.contract import Context, Note, Pass, PassResult
from thresher.rewriting.manager import PassManager
from thresher.rewriting.registry import make_pass, register_pass, registered_passes

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies the first weight by a factor: exact only for 1."""

    name: ClassVar[str] = "test-scale"
    factor: float = 1.0

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        work.constants["0.weight"] = work.constants["0.weight"].double() * self.factor
        return PassResult(work, [Note.at(next(work.calls()), f"scaled by {self.factor}")])


@dataclass(frozen=True)
class Mutates(Pass):
    name: ClassVar[str] = "test-mutates"

    def apply(self, program: Program, context: Context) -> PassResult:
        program.constants["0.weight"].mul_(1.0)
        return PassResult(program)


@dataclass(frozen=True)
class Malformed(Pass):
    name: ClassVar[str] = "test-malformed"

    def apply(self, program: Program, context: Context) -> PassResult:
        work = program.clone()
        work.constants["0.weight"] = torch.zeros(1, 1)
        return PassResult(work, [Note.at(next(work.calls()), "broke it")])


@dataclass(frozen=True)
class Raises(Pass):
    name: ClassVar[str] = "test-raises"

    def apply(self, program: Program, context: Context) -> PassResult:
        raise KeyError("a defect of the pass")


@dataclass(frozen=True)
class Picky(Pass):
    name: ClassVar[str] = "test-picky"
    requires: ClassVar[tuple[str, ...]] = ("test-scale",)
    target_ops: ClassVar[tuple] = (aten.conv2d.default,)

    def apply(self, program: Program, context: Context) -> PassResult:
        raise AssertionError("must be skipped: there is no convolution")


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(3, 4),))


@pytest.mark.parametrize("verify", ["each", "final"])
def test_inexact_pass_is_reverted_and_the_node_named(program: Program, verify: str) -> None:
    """Also when the check comes only at the end: the guilty pass is found, the innocent ones stay."""
    manager = PassManager([Scale(), Scale(1.001), Scale()], verify)
    result = manager.run(program)
    assert [r.status for r in manager.records] == ["changed", "reverted", "changed"]
    assert "first at node linear (0)" in manager.records[1].failure
    torch.testing.assert_close(result.run(*program.probe), program.run(*program.probe), rtol=0, atol=0)


def test_verify_off_lets_it_pass(program: Program) -> None:
    manager = PassManager([Scale(1.001)], "off")
    manager.run(program)
    assert manager.records[0].status == "changed"


def test_error_is_measured(program: Program) -> None:
    manager = PassManager([Scale(1 + 1e-12)], "each")
    manager.run(program)
    assert manager.records[0].status == "changed" and 0 < manager.records[0].error < 1e-9


@pytest.mark.parametrize("bad", [Malformed(), Raises()])
def test_broken_pass_is_reverted(program: Program, bad: Pass) -> None:
    manager = PassManager([bad])
    assert manager.run(program) is program
    assert manager.records[0].status == "reverted" and manager.records[0].failure


def test_mutating_the_input_is_an_error(program: Program) -> None:
    with pytest.raises(PassError, match="changed the program it was given"):
        PassManager([Mutates()]).run(program)


def test_order_and_skipping(program: Program) -> None:
    with pytest.raises(PassError, match="'test-picky' requires test-scale"):
        PassManager([Picky()]).run(program)
    manager = PassManager([Scale(), Picky()])
    manager.run(program)
    assert manager.records[1].status == "skipped"


def test_unknown_names_and_options() -> None:
    with pytest.raises(PassError, match=r"unknown pass 'no-such-pass'; known passes: .*fold-channels"):
        make_pass("no-such-pass")
    with pytest.raises(PassError, match="has no option 'depth'; its options: strict"):
        make_pass("fold-channels{depth=3}")
    with pytest.raises(PassError, match="takes a bool"):
        make_pass("fold-channels{strict=perhaps}")
    with pytest.raises(PassError, match="cannot read"):
        make_pass("fold-channels{strict=true")
    with pytest.raises(PassError, match="verify must be"):
        PassManager([], "sometimes").run(capture(nn.ReLU(), (torch.randn(2),)))


def test_options_from_text() -> None:
    made = make_pass("fold-channels{strict=true}")
    assert made.strict is True and str(made) == "fold-channels{strict=True}"


def test_registration_is_checked() -> None:
    class NotADataclass(Pass):
        name: ClassVar[str] = "test-not-frozen"

    with pytest.raises(PassError, match="frozen dataclass"):
        register_pass(NotADataclass)

    @dataclass(frozen=True)
    class Nameless(Pass):
        pass

    with pytest.raises(PassError, match="has no name"):
        register_pass(Nameless)
    assert {
        "evaluate-constants",
        "simplify",
        "fold-batch-norm",
        "fold-channels",
        "channels-last",
    } <= registered_passes().keys()


def test_dumps(program: Program, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("THRESHER_DUMP", str(tmp_path / "dump"))
    PassManager([Scale(1.0), "simplify"]).run(program)
    assert sorted(p.name for p in (tmp_path / "dump").iterdir()) == [
        "00-captured.txt",
        "01-test-scale.diff",
        "01-test-scale.txt",
    ]
