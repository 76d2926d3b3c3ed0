"""Capturing: modules, exported programs and files; state, control flow and other things that are refused with the user's line."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.experimental.control_flow import map as map_over
from torch import Tensor, nn
from torch._higher_order_ops import scan, while_loop
from torch.nn.attention.flex_attention import flex_attention

from helpers.modules import Function
from thresher.errors import CaptureError
from thresher.frontend import decompositions
from thresher.frontend.capture import capture
from thresher.frontend.fast_decompositions import fast_decompositions
from thresher.testing import ZOO, settle


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
    assert "test_capture.py" in str(error.value) and "torch.where" in str(error.value)


@pytest.mark.parametrize("thing", [3, "missing.pt2", lambda x: x])
def test_what_cannot_be_captured(thing) -> None:
    with pytest.raises(CaptureError):
        capture(thing, (torch.randn(3),))


def test_not_a_pt2_file(tmp_path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"not a file of torch")
    with pytest.raises(CaptureError, match=r"not a torch\.export file"):
        capture(tmp_path / "m.pt2")


def test_an_exported_program_is_left_as_it_was() -> None:
    exported = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 4),))
    x = torch.ones(2, 4)
    assert capture(exported, (x,)).probe[0] is x
    assert torch.equal(exported.example_inputs[0][0], torch.zeros(2, 4))


def branches(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def doubled_until_large(x: Tensor) -> Tensor:
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))[1]


def running_sum(x: Tensor) -> Tensor:
    return scan(lambda carry, row: (carry + row, carry * row), torch.zeros(4), x, dim=0)[1]


def rows(x: Tensor) -> Tensor:
    return map_over(lambda row, y: row + y, x, torch.ones(4))


def biased_attention(x: Tensor) -> Tensor:
    q = x[None, None]
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + i - j)


def unrolled_sum(x: Tensor) -> Tensor:
    carry, products = torch.zeros(4), []
    for row in x:
        products.append(carry * row)
        carry = carry + row
    return torch.stack(products)


def doubled_thrice(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x * 2
    return x


def masked_attention(x: Tensor) -> Tensor:
    q, i = x[None, None], torch.arange(5.0)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=i[:, None] - i)


#: (the operator, its words in the message, what the message advises).
SUBGRAPHS: list[tuple[Callable, str, Callable]] = [
    (branches, r"torch\.cond", lambda x: torch.where(x.sum() > 0, x + 1, x - 1)),
    (doubled_until_large, "while_loop", doubled_thrice),
    (running_sum, "scan", unrolled_sum),
    (rows, "map", torch.vmap(lambda row: row + torch.ones(4))),
    (biased_attention, "flex_attention", masked_attention),
]


@pytest.mark.filterwarnings("ignore")  # torch's of functions that are no longer new
@pytest.mark.parametrize(("function", "name", "advised"), SUBGRAPHS, ids=[name for _, name, _ in SUBGRAPHS])
def test_operators_with_subgraphs_are_refused_with_a_cure_that_works(
    function: Callable, name: str, advised: Callable
) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)  # the guilty line

    x = torch.randn(5, 4)
    with pytest.raises(CaptureError, match=rf"calls {name} \(File \".*test_capture\.py\", line"):
        capture(nn.Sequential(Model()), (x,))
    torch.testing.assert_close(capture(Function(advised), (x,))(x), function(x))


@pytest.mark.filterwarnings("ignore")  # that one branch is taken
def test_a_branch_on_a_shape_is_taken() -> None:
    program = capture(
        Function(lambda x: torch.cond(x.shape[0] > 2, lambda: x + 1, lambda: x - 1, ())), (torch.ones(5),)
    )
    assert torch.equal(program(torch.ones(5)), torch.full((5,), 2.0))


def test_padding_leaves_a_free_dimension_free() -> None:
    """The operator's own kernel would fix the number of samples, silently, for all of the program."""
    model = Function(lambda x: torch.nn.functional.pad(x, (1, 2)).relu())
    program = capture(model, (torch.randn(3, 4),), dynamic_shapes=(({0: torch.export.Dim("batch", min=2)},),))
    program.propagate().verify()
    assert all(isinstance(n.meta["val"].shape[0], torch.SymInt) for n in program.graph.nodes if n.op != "output")
    assert program.run(torch.randn(7, 4))[0].shape == (7, 7)


@pytest.mark.parametrize("name", ["vit", "mobilenet"])
def test_the_fast_decomposition_is_that_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = ZOO[name]()
    quick = capture(settle(model), args).text()
    monkeypatch.setattr(decompositions, "fast_decompositions", contextlib.nullcontext)
    assert capture(model, args).text() == quick


NOT_DECOMPOSED = {
    "calls that stay": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), True),
    "a call in the table": (nn.Softshrink(), False),
    "a composite call": (nn.Flatten(), False),
    "one of torch's that is said to stay": (nn.BatchNorm2d(3), False),
    "a write": (nn.ReLU(inplace=True), False),
}


@pytest.mark.parametrize("what", NOT_DECOMPOSED)
def test_what_is_decomposed_already_is_not_traced_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, same), x = NOT_DECOMPOSED[what], torch.randn(2, 3, 8, 8)
    exported = torch.export.export(model.eval(), (x,), strict=False)
    assert (decompositions.decompose(exported) is exported) == same
    text = capture(model, (x,)).text()
    monkeypatch.setattr(decompositions, "_is_decomposed", lambda exported, table: False)
    assert capture(model, (x,)).text() == text


@pytest.mark.parametrize(
    "where", ["export.exported_program._override_composite_implicit_decomp", "_export.utils._materialize_cpp_cia_ops"]
)
def test_what_makes_it_fast_lasts_for_a_capture(where: str) -> None:
    function = operator.attrgetter(where)(torch)
    capture(Function(torch.relu).eval(), (torch.eye(3),))
    assert operator.attrgetter(where)(torch) is function
    first, second = fast_decompositions(), fast_decompositions()  # two threads: the one that began first ends first
    first.__enter__()
    second.__enter__()
    assert operator.attrgetter(where)(torch) is not function
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert operator.attrgetter(where)(torch) is function


def test_sparse_values_are_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"makes a sparse_coo tensor by aten._to_sparse.default \(.*leave it dense"):
        capture(Function(torch.Tensor.to_sparse).eval(), (torch.eye(3),))


def test_sparse_inputs_are_refused_by_name() -> None:
    sparse = torch.eye(3).to_sparse_csr()
    with pytest.raises(CaptureError, match=r"the input \[1\] is a sparse_csr tensor.*to_dense"):
        capture(Function(torch.add).eval(), (torch.eye(3), sparse))


def test_conversions_in_forward_that_change_nothing() -> None:
    """The routers of Switch Transformers: torch cannot exchange the parameters of a module that is traced."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier.to(x.dtype)(x)

    model, x = Router().eval(), torch.randn(2, 3)
    torch.testing.assert_close(capture(model, (x,)).run(x)[0], model(x))
    with pytest.raises(CaptureError, match="Router could not be exported"):
        capture(model, (x.double(),))
    assert model.classifier.weight.dtype is torch.float32


def test_tied_parameters_beside_an_input_with_the_name_of_a_builtin() -> None:
    """A copy of torch's graph calls ``input`` another name."""
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()
    model[1].weight = model[0].bias
    x = torch.randn(2, 3, 5)
    program = capture(model, (x,))
    assert torch.equal(program.run(x)[0], model(x)) and len(program.constants) == 5
