"""Operators without a lowering: torch's decomposition, else torch's own kernel called from the compiled code, named with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import thresher
from helpers.modules import Function
from thresher.backends.tvm.importing import importer as importing
from thresher.errors import BackendError, CaptureError, OperatorError

X = torch.linspace(-2, 2, 24).reshape(4, 6) ** 3 - 0.3


def equal(result: object, expected: object) -> bool:
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (result, expected)), strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, atol=1e-5, equal_nan=True) for a, b in pairs
    )


def compiled(function: Callable, *inputs: Tensor, **options: object) -> thresher.Compiled:
    model = Function(function).eval()
    result = thresher.compile(model, inputs, target="cpu", **options)
    assert equal(result(*inputs), function(*inputs))
    return result


BY_TORCH = {
    "two results": (lambda x: torch.kthvalue(x, 2, 1), "aten.kthvalue.default"),
    "integers out": (lambda x: torch.histc(x, 5).long(), "aten.histc.default"),
    "one of several results": (lambda x: torch.linalg.svd(x)[1], "aten._linalg_svd.default"),
    "a size that data decide": (lambda x: torch.nonzero(x > 0).sum(0), "aten.nonzero.default"),
    "two such sizes": (lambda x: torch.cat([x[x > 0], x[x > 1]]).exp(), "aten.index.Tensor"),
    "such a size among several results": (
        lambda x: torch.unique(x.round(), return_counts=True),
        "aten._unique2.default",
    ),
    "such a size among several results, read": (
        lambda x: [r.new_full(r.shape, 2) * r for r in torch.unique(x.round(), return_counts=True)],
        "aten._unique2.default",
    ),
    "half": (lambda x: torch.special.i0e(x.half()), "aten.special_i0e.default"),
    "complex inside": (lambda x: torch.polar(x.abs(), x).log().real, "aten.log.default"),
    "a size beside one that is 0": (
        lambda x: torch.nonzero(x[0, 0] * 0 + 1).sum(0) + torch.nonzero(x.sum()),
        "aten.nonzero.default",
    ),
    "complex halves": (lambda x: torch.special.i1(x).chalf(), "aten.special_i1.default"),
    "order of equal elements": (lambda x: x.bfloat16().round().sort(-1), "aten.sort.default"),
    "order of truth values": (lambda x: (x > 0).argsort(-1, descending=True), "aten.sort.default"),
    "floats of eight bits": (lambda x: (x * 1e3).to(torch.float8_e5m2fnuz).float(), "aten._to_copy.default"),
    "means of whole numbers": (
        lambda x: torch.nn.functional.avg_pool2d((x * 9).long()[None], 2),
        "aten.avg_pool2d.default",
    ),
    "means of whole rows": (
        lambda x: torch.nn.functional.avg_pool1d((x * 9).long(), 3),
        "aten.avg_pool1d.default",
    ),
    "the largest whole numbers": (lambda x: x.long().topk(3), "aten.topk.default"),
    "no elements read": (lambda x: x[:0].sum(0) + x, "aten.sum.dim_IntList"),
}


def test_nothing_where_the_data_decide_how_much() -> None:
    """An empty result has strides of its own in torch."""

    def function(x: Tensor) -> list[Tensor]:
        places = torch.nonzero(x > 1)
        return [places.mT * 2, places + 1, torch.nn.functional.pad(x[:, x[0] > 1] + 1, (1, 0))]

    model = compiled(function, X)
    for x in (torch.zeros_like(X), torch.ones_like(X) * 2):
        assert equal(model(x), function(x))


@pytest.mark.parametrize("name", BY_TORCH)
def test_torch_computes_what_has_no_lowering(name: str) -> None:
    function, operator = BY_TORCH[name]
    model = compiled(function, X)
    assert operator in {call.operator for call in model.report.library}
    assert all(call.reason for call in model.report.library)
    assert "computed by torch: " in str(model.report) and f"{operator} (" in str(model.report)
    with pytest.raises(BackendError, match=r"cannot lower node .*library='auto' torch computes it"):
        thresher.compile(Function(function).eval(), (X,), target="cpu", library="never", validate="off")


@pytest.mark.parametrize(
    ("function", "wrong", "message"),
    [
        (
            torch.linalg.cholesky,
            -torch.eye(3),
            r"linalg_cholesky \(aten.linalg_cholesky.default\): .*not positive-definite",
        ),
        (torch.linalg.inv, torch.zeros(3, 3), r"linalg_inv \(aten.linalg_inv.default\): .*singular"),
    ],
)
def test_what_raises_in_torch_raises_by_name(function: Callable, wrong: Tensor, message: str, tmp_path) -> None:
    model = compiled(function, torch.eye(3) * 2)
    loaded = thresher.load(model.save(tmp_path / "m.thresher"))
    for runs in (model, loaded):
        with pytest.raises(OperatorError, match=message):
            runs(wrong)
        assert equal(runs(torch.eye(3)), function(torch.eye(3)))


@pytest.mark.parametrize("complex_dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_in_and_out(complex_dtype: torch.dtype, tmp_path) -> None:
    z = torch.complex(X.double(), X.double().flip(0)).to(complex_dtype)

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a * b.conj() + 2j, (a @ b.mT).abs(), torch.view_as_real(a.resolve_conj())

    model = compiled(function, z, z.flip(1))
    assert equal(model(z.conj(), z.flip(1)), function(z.conj(), z.flip(1)))
    loaded = thresher.load(model.save(tmp_path / "m.thresher"))
    assert equal(loaded(z, z.flip(1)), function(z, z.flip(1)))
    as_arrays = loaded(z.numpy(), z.flip(1).numpy())
    assert equal([torch.from_numpy(a) for a in as_arrays], list(function(z, z.flip(1))))


def test_complex_arithmetic_needs_no_torch() -> None:
    z = torch.complex(X, X.flip(1) / 3)

    def rotate(a: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        turned = torch.view_as_complex(x.reshape(4, 3, 2)) * a[:, :3] - (1 - 2j)
        moved = torch.cat([-a[None].expand(2, 4, 6)[:, -1], a[1:3]], 0)[1]
        return torch.view_as_real(turned).flatten(1), (a.mT * 2j + x.mT - a.conj().mT).abs(), moved

    model = compiled(rotate, z, X, library="never")
    assert equal(model(z / 3, X * 2), rotate(z / 3, X * 2))


def test_an_artifact_names_the_calls(tmp_path) -> None:
    model = compiled(lambda x: torch.kthvalue(x, 2, 1)[0] * 2, X)
    loaded = thresher.load(model.save(tmp_path / "m.thresher"))
    assert loaded.executable.library == model.executable.library != []
    assert equal(loaded(X), model(X))
    (call,) = model.report.library
    assert call.milliseconds > 0 and call.node in {n for k in model.report.kernels for n in k.nodes}


def test_a_size_that_data_decide_changes() -> None:
    model = compiled(lambda x: (x[x > 0] * 2, torch.nonzero(x > 1)), X)
    for other in (-X, X * 0, X + 100):
        assert equal(model(other), (other[other > 0] * 2, torch.nonzero(other > 1)))


def test_a_converter_that_gives_another_kind_is_passed_over(monkeypatch) -> None:
    """A dtype or a shape other than the node's is no value for the rest of the program."""
    table = importing.Importer._ways

    def ways(self, node):
        yield "a wrong lowering", lambda n: self.emit(importing.relax.op.astype(self.value(n.args[0]), "float64"))
        yield "another", lambda n: self.emit(importing.relax.op.reshape(self.value(n.args[0]), [24]))
        yield from table(self, node)

    monkeypatch.setattr(importing.Importer, "_ways", ways)
    reason = compiled(lambda x: torch.special.bessel_j0(x), X).report.library[0].reason
    assert reason.startswith(
        "a wrong lowering: it gives float64 instead of float32; another: it gives 1 dimensions instead of 2"
    )


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x + torch.rand_like(x), "torch.rand_like"),
        (lambda x: torch.nn.functional.dropout(x, 0.5, True), "dropout"),
        (lambda x: torch.bernoulli(x.sigmoid()), "aten.rand"),
        (lambda x: x[torch.randperm(4)], "aten.randperm"),
    ],
)
def test_random_numbers_are_refused(function: Callable, name: str) -> None:
    with pytest.raises(CaptureError, match=f"draws random numbers by {name}.*pass them in as an input"):
        thresher.compile(Function(function).eval(), (X,), target="cpu")


def test_what_draws_nothing_is_not_refused() -> None:
    compiled(lambda x: torch.nn.functional.dropout(x, 0.0, True) + torch.rrelu(x, training=False), X)


def test_what_tvm_gets_wrong_is_left_to_torch() -> None:
    """TVM's own converter takes other weights for this one."""
    image = torch.rand(1, 2, 6, 5)
    model = compiled(lambda x: torch.nn.functional.interpolate(x, size=(3, 7), mode="bilinear", antialias=True), image)
    assert [call.operator for call in model.report.library] == ["aten._upsample_bilinear2d_aa.default"]


def test_strides_of_memory_that_compiled_code_has_not_are_refused() -> None:
    """Compiled code holds every value contiguous, so a read by the strides of eager's would be of other elements."""
    with pytest.raises(BackendError, match=r"as_strided.* is not contiguous: call \.contiguous\(\) before it"):
        compiled(lambda x: (x * 2)[:, 1:].as_strided((2, 2), (1, 1)), X)
