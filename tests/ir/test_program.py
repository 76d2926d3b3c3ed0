"""The graph IR: capture of what users have, well-formedness, text form, running in float64, giving it back as a module."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from thresher.errors import InputError, ProgramError
from thresher.frontend.capture import capture
from thresher.ir.nodes import module_path, source_line
from thresher.ir.parser import parse
from thresher.ir.program import Program
from thresher.testing import ZOO


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


class Steps(nn.Module):
    """Writes into a buffer and into an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        self.inner.count += 1
        y.mul_(x)
        return y * self.inner.count, 5


def test_what_is_written_is_in_the_program_and_in_its_text() -> None:
    program = capture(Steps(), (torch.ones(3), torch.full((3,), 2.0)))
    assert program.state == ("inner.count",) and {program.placeholders[i].name for i in program.writes} == {
        "y",
        "b_inner_count",
    }
    text = program.text()
    assert '%b_inner_count = state "inner.count" : f32[]' in text and "write %y = %mul" in text
    again = parse(text).verify()
    assert again.structurally_equal(program) and again.structurally_equal(again.clone())
    assert (again.state, again.writes, again.out_spec.num_leaves) == (program.state, program.writes, 2)
    assert program(torch.ones(3), torch.full((3,), 2.0))[0].tolist() == [2, 2, 2]  # the first call, every time
    other = program.clone()
    other.writes = tuple(reversed(other.writes))
    assert not other.structurally_equal(program)
    with pytest.raises(ProgramError, match=r"is written into .*, and has another shape"):
        other.verify()


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

    def dead_call(p: Program) -> None:
        p.insert_call(p.output, torch.ops.aten.neg.default, (p.placeholders[0],))

    def unread(p: Program) -> None:
        p.add_constant(torch.zeros(1), "unread")

    def missing(p: Program) -> None:
        del p.constants["0.bias"]

    def misfit(p: Program) -> None:
        relu = next(p.calls(torch.ops.aten.relu.default))
        relu.args = (p.placeholders[0],)

    for change, message in (
        (wrong_shape, "0.weight"),
        (wrong_metadata, "relu"),
        (dangling, r"constants that no node reads: \['nobody'\]; call clean"),
        (dead_call, r"nothing reads the call neg_default \(aten.neg.default\); call clean"),
        (unread, "nothing reads the constant 'unread'; call clean"),
        (missing, "0.bias"),
        (misfit, "relu|linear"),
    ):
        with pytest.raises(ProgramError, match=message):
            broken(change).verify()
        if change in (dangling, dead_call, unread):  # the cure that the message names
            broken(change).clean().verify()
    small().verify()


def test_float64_run_replaces_every_dtype() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().softmax(-1, dtype=torch.float32) + torch.arange(4, dtype=torch.float32)

    program = capture(Casts(), (torch.randn(2, 4),))
    (result,) = program.run(torch.randn(2, 4), dtype=torch.float64)
    assert result.dtype is torch.float64


def test_float64_run_replaces_complex_types_by_the_wider_one() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("phase", torch.ones(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.phase).to(torch.complex64) / 3

    program = capture(Casts(), (torch.randn(2, 4),))
    (result,) = program.run(torch.ones(2, 4), dtype=torch.float64)
    assert result.dtype is torch.complex128 and abs(result[0, 0].item() - 1 / 3) < 1e-15


def test_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=32)
    model, args = ZOO["vit"]()
    program = capture(model.eval(), args, dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(x), model(x), atol=1e-5, rtol=1e-4)
    assert program.verify().signature("cpu").inputs[0].shape[1:] == (3, 32, 32)
    assert isinstance(program.signature("cpu").inputs[0].shape[0], str)


@pytest.mark.parametrize(
    "dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2fnuz]
)
def test_every_type_has_a_text(dtype: torch.dtype) -> None:
    """A program of unsigned integers, or of numbers of 8 bits, is written, and read back as the same."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 3)

    program = capture(Model(), (torch.zeros(6, dtype=torch.uint8).to(dtype),))
    again = parse(program.text())
    assert again.structurally_equal(program) and again.text() == program.text()
