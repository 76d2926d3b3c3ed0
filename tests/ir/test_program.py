"""The graph IR: capture of what users have, well-formedness, text form, running in float64, giving it back as a module."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch
from torch import Tensor, nn

from helpers.modules import Function
from thresher.errors import CaptureError, InputError, ProgramError
from thresher.frontend.capture import capture
from thresher.frontend.fast_decompositions import give_kernel
from thresher.ir.nodes import module_path, source_line
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.testing import ZOO, settle


class Nested(nn.Module):
    """Nested inputs and outputs, a keyword, a literal, several results."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(
        self, pair: tuple[Tensor, Tensor], table: dict[str, Tensor], *, scale: float = 2.0, flag: bool = True
    ) -> dict:
        y = self.a(pair[0]) + pair[1] * scale
        return {"sum": y, "parts": [table["z"] - y, y.argmax(-1)], "literal": 3 if flag else None}


def nested_call() -> tuple[tuple, dict]:
    return ((torch.randn(2, 4), torch.randn(2, 4)), {"z": torch.randn(2, 4)}), {"scale": 0.5, "flag": True}


def small() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(3, 4),))


def test_nested_structures_and_literals() -> None:
    model = Nested().eval()
    args, kwargs = nested_call()
    program = capture(model, args, kwargs)
    found, expected = program(*args, **kwargs), model(*args, **kwargs)
    assert found.keys() == expected.keys() and found["literal"] == 3
    torch.testing.assert_close(found["sum"], expected["sum"])
    torch.testing.assert_close(found["parts"], expected["parts"])


def test_wrong_structure_is_named() -> None:
    program = capture(Nested().eval(), *nested_call())
    with pytest.raises(InputError, match="structure"):
        program(torch.randn(2, 4), {"z": torch.randn(2, 4)}, scale=0.5, flag=True)
    with pytest.raises(InputError, match="keyword"):
        program(*nested_call()[0])


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    """torch.export merges two inputs that are one object; capture() must not."""

    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.randn(3)
    program = capture(Two(), (x, x))
    a, b = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(program(a, b), a - 2 * b)


def test_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[0].eval()
    capture(model, (torch.randn(2, 4),))
    assert model.training and model[1].training and not model[0].training


def test_pt2_and_exported_program(tmp_path) -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    exported = torch.export.export(model, (x,))
    torch.export.save(exported, tmp_path / "m.pt2")
    for source in (exported, tmp_path / "m.pt2", str(tmp_path / "m.pt2")):
        torch.testing.assert_close(capture(source)(x), model(x))


def test_data_dependent_control_flow_names_the_users_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # the guilty line
                return x
            return -x

    with pytest.raises(CaptureError) as error:
        capture(Branch(), (torch.randn(3),))
    assert "test_program.py" in str(error.value) and "torch.cond" in str(error.value)


def test_state_that_changes_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.count

    with pytest.raises(CaptureError, match="count"):
        capture(Counter(), (torch.randn(3),))


@pytest.mark.parametrize("thing", [3, "missing.pt2", lambda x: x])
def test_what_cannot_be_captured(thing) -> None:
    with pytest.raises(CaptureError):
        capture(thing, (torch.randn(3),))


def test_not_a_pt2_file(tmp_path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"not a file of torch")
    with pytest.raises(CaptureError, match=r"not a torch\.export file"):
        capture(tmp_path / "m.pt2")


def test_nodes_know_where_they_come_from() -> None:
    model, args = ZOO["resnet18"]()
    program = capture(model, args)
    conv = next(program.calls(torch.ops.aten.conv2d.default))
    assert module_path(conv) == "conv1"
    assert "resnet.py" in source_line(conv)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_text_round_trips(name: str) -> None:
    model, args = ZOO[name]()
    program = capture(model, args)
    again = parse(program.text())
    assert again.structurally_equal(program)
    assert again.text() == parse(again.text()).text()
    again.verify()


def test_text_that_cannot_be_read_names_the_line() -> None:
    text = small().text().replace("aten.relu.default", "aten.no_such_operator.default")
    with pytest.raises(ProgramError, match=r"line \d+ cannot be read|unknown operator"):
        parse(text)
    with pytest.raises(ProgramError, match="line"):
        parse(
            small()
            .text()
            .replace("%linear, ", "__import__('os').getcwd(), ")
            .replace("(%linear)", "(__import__('os'))")
        )


def test_diff_shows_the_difference() -> None:
    program = small()
    other = program.clone()
    relu = next(other.calls(torch.ops.aten.relu.default))
    relu.target = torch.ops.aten.gelu.default
    assert program.diff(program.clone()) == ""
    assert "aten.gelu.default" in program.diff(other) and not program.structurally_equal(other)


def test_clone_is_independent() -> None:
    program = small()
    text = program.text()
    copy = program.clone()
    next(copy.calls(torch.ops.aten.relu.default)).target = torch.ops.aten.gelu.default
    copy.constants.pop("0.weight")
    assert program.text() == text and "0.weight" in program.constants


def test_verify_catches_what_is_wrong() -> None:
    def broken(change) -> Program:
        program = small()
        change(program)
        return program

    def wrong_shape(p: Program) -> None:
        p.constants["0.weight"] = torch.zeros(5, 4)

    def wrong_metadata(p: Program) -> None:
        relu = next(p.calls(torch.ops.aten.relu.default))
        relu.meta["val"] = relu.meta["val"].new_empty(3, 7)

    def dangling(p: Program) -> None:
        p.constants["nobody"] = torch.zeros(1)

    def missing(p: Program) -> None:
        del p.constants["0.bias"]

    def misfit(p: Program) -> None:
        relu = next(p.calls(torch.ops.aten.relu.default))
        relu.args = (p.placeholders[0],)

    for change, message in (
        (wrong_shape, "0.weight"),
        (wrong_metadata, "relu"),
        (dangling, "nobody"),
        (missing, "0.bias"),
        (misfit, "relu|linear"),
    ):
        with pytest.raises(ProgramError, match=message):
            broken(change).verify()
    small().verify()


def test_float64_run_replaces_every_dtype() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().softmax(-1, dtype=torch.float32) + torch.arange(4, dtype=torch.float32)

    program = capture(Casts(), (torch.randn(2, 4),))
    (result,) = program.run(torch.randn(2, 4), dtype=torch.float64)
    assert result.dtype is torch.float64


def test_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=32)
    model, args = ZOO["vit"]()
    program = capture(model.eval(), args, dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-4)
    assert program.verify().signature("cpu").inputs[0].shape[1:] == (3, 32, 32)
    assert isinstance(program.signature("cpu").inputs[0].shape[0], str)


def test_padding_leaves_a_free_dimension_free() -> None:
    """The operator's own kernel would fix the number of samples, silently, for all of the program."""
    model = Function(lambda x: torch.nn.functional.pad(x, (1, 2)).relu())
    program = capture(model, (torch.randn(3, 4),), dynamic_shapes=(({0: torch.export.Dim("batch", min=2)},),))
    program.propagate().verify()
    assert all(isinstance(n.meta["val"].shape[0], torch.SymInt) for n in program.graph.nodes if n.op != "output")
    assert program.run(torch.randn(7, 4))[0].shape == (7, 7)


@pytest.mark.parametrize("name", ["vit", "mobilenet"])
def test_the_quick_export_is_the_export(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = ZOO[name]()
    quick = capture(settle(model), args).text()
    kernel = torch._ops.OperatorBase.py_impl
    monkeypatch.setattr(sys.modules["thresher.frontend.capture"], "fast_decompositions", contextlib.nullcontext)
    assert capture(model, args).text() == quick
    assert torch._ops.OperatorBase.py_impl is kernel is give_kernel
