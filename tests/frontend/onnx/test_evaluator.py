"""How graphs are run: constants, functions, branches, loops, sequences, and what is refused in them."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from helpers.onnx_cases import one_node, parsed, run
from thresher.errors import CaptureError
from thresher.frontend.capture import capture
from thresher.frontend.onnx import rules
from thresher.frontend.onnx.model import OnnxModel
from thresher.frontend.onnx.reader import read_onnx

X = torch.tensor([1.0, -2.0, 3.0])


def test_branches_with_the_same_names_inside() -> None:
    """A name in one branch is not the one of the other."""
    model = parsed("""g (float[3] x, bool c) => (float[3] y) {
        y = If (c) <then_branch = t () => (float[3] z) { k = Constant<value = float {2}> () z = Mul(x, k) },
                    else_branch = e () => (float[3] z) { k = Constant<value = float {5}> () z = Mul(x, k) }> }""")
    assert torch.equal(run(model, X, c=True), 2 * X) and torch.equal(run(model, X, c=False), 5 * X)
    with pytest.raises(
        CaptureError, match=r"node 'y' \(If\): values of c decide its condition\. .*fixed={'c': \.\.\.}"
    ):
        run(model, X, torch.tensor(True))


LOOP = """g (float[3] x, int64 n, bool c) => (float[3] y, float[k, 3] ys) {
    y, ys = Loop (n, c, x) <body = b (int64 i, bool go, float[3] s) => (bool on, float[3] t, float[3] out) {
        f = CastLike(i, s) t = Add(s, f) out = Identity(t) four = Constant<value = int64 {4}> () on = Less(i, four) }> }"""


def test_loops_of_constant_counts_are_unrolled() -> None:
    y, ys = run(parsed(LOOP), X, n=3, c=True)
    assert torch.equal(y, X + 3) and torch.equal(ys, torch.stack([X, X + 1, X + 3]))
    y, ys = run(parsed(LOOP), X, n=100, c=True)  # until the condition of the body is false
    assert torch.equal(y, X + 10) and ys.shape == (5, 3)
    program = capture(OnnxModel(parsed(LOOP), {"n": 3, "c": True}), (X,))
    assert torch.equal(program(X + 1)[0], X + 4)


@pytest.mark.parametrize(
    ("fixed", "sentence"),
    [
        ({"c": True}, "values of n decide its trip count"),
        ({"n": 3}, "values of c decide its condition"),
        ({"n": 0, "c": True}, "a loop of no steps, whose stacked outputs have no shape"),
    ],
)
def test_loops_that_are_refused(fixed: dict, sentence: str) -> None:
    others = [v for k, v in {"n": torch.tensor(3), "c": torch.tensor(True)}.items() if k not in fixed]
    with pytest.raises(CaptureError, match=re.escape(sentence)):
        run(parsed(LOOP), X, *others, **fixed)


def test_a_loop_that_does_not_end_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("thresher.frontend.onnx.control.MAX_STEPS", 20)
    model = parsed("""g (float[3] x) => (float[3] y) {
        y = Loop (, , x) <body = b (int64 i, bool go, float[3] s) => (bool on, float[3] t) { t = Neg(s) on = Identity(go) }> }""")
    with pytest.raises(CaptureError, match="the loop takes 20 steps or more"):
        run(model, X)


SCAN = """g (float[2] s, float[3, 2] x) => (float[2] t, float[3, 2] y) {
    t, y = Scan<num_scan_inputs = 1, ATTRIBUTES body = b (float[2] a, float[2] e) => (float[2] n, float[2] o) {
        n = Add(a, e) o = Identity(n) }> (s, x) }"""


@pytest.mark.parametrize("backward", [0, 1])
@pytest.mark.parametrize("prepended", [0, 1])
def test_scans(backward: int, prepended: int) -> None:
    attributes = f"scan_input_directions = [{backward}], scan_output_directions = [{prepended}],"
    state, x = torch.tensor([10.0, 20.0]), torch.arange(6.0).reshape(3, 2)
    last, y = run(parsed(SCAN.replace("ATTRIBUTES", attributes)), state, x)
    steps = state + (x.flip(0) if backward else x).cumsum(0)
    assert torch.equal(last, steps[-1]) and torch.equal(y, steps.flip(0) if prepended else steps)


def test_sequences_and_optionals() -> None:
    model = parsed("""g (float[3] x, float[2] y) => (float[5] c, int64 n, float[2] last, bool has) {
        s = SequenceConstruct(x, y) minus = Constant<value = int64 {-1}> () zero = Constant<value = int64 {0}> ()
        twice = SequenceInsert(s, y, zero) once = SequenceErase(twice, zero)
        c = ConcatFromSequence<axis = 0>(once) n = SequenceLength(twice) last = SequenceAt(s, minus)
        o = Optional(x) has = OptionalHasElement(o) }""")
    c, n, last, has = run(model, X, X[:2])
    assert torch.equal(c, torch.cat([X, X[:2]])) and n == 3 and torch.equal(last, X[:2]) and has


def test_sequences_are_lists_and_empty_optionals_none() -> None:
    info = helper.make_tensor_sequence_value_info
    graph = helper.make_graph(
        [helper.make_node("SequenceAt", ["s", "i"], ["y"]), helper.make_node("SequenceErase", ["s", "i"], ["rest"])],
        "g",
        [info("s", TensorProto.FLOAT, None), helper.make_tensor_value_info("i", TensorProto.INT64, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None), info("rest", TensorProto.FLOAT, None)],
    )
    y, rest = run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), [X, X + 1], i=1)
    assert torch.equal(y, X + 1) and len(rest) == 1 and torch.equal(rest[0], X)
    optional = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [3]))
    graph = helper.make_graph(
        [helper.make_node("OptionalHasElement", ["x"], ["y"])],
        "g",
        [helper.make_value_info("x", optional)],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert run(model, X) and not run(model, None)


def test_functions_of_the_file() -> None:
    """A function calls another one, and hands its attribute on."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18, "own" : 1]>
        g (float[3] x) => (float[3] y) { y = own.twice<slope = 0.5>(x) }
        <domain: "own", opset_import: ["" : 18, "own" : 1]> twice <slope> (a) => (c) {
            b = own.leaky<slope : float = @slope>(a) c = own.leaky<slope : float = @slope>(b) }
        <domain: "own", opset_import: ["" : 18]> leaky <slope> (a) => (b) { b = LeakyRelu<alpha : float = @slope>(a) }""")
    onnx.checker.check_model(model)
    assert torch.equal(run(model, X), torch.tensor([1.0, -0.5, 3.0]))
    del model.functions[1]
    with pytest.raises(CaptureError, match=r"operators that are not known here: own\.leaky"):
        OnnxModel(model, {})


@pytest.mark.parametrize("op", ["Attention", "RMSNormalization", "CastLike", "Shrink"])
def test_definitions_of_the_specification(op: str, monkeypatch) -> None:
    """Without its rule an operator is computed by the function body that ONNX ships, and comes out the same."""
    random = np.random.default_rng(0)
    values = {
        "Attention": [random.standard_normal((1, 2, 4, 8)).astype("f") for _ in range(3)],
        "RMSNormalization": [random.standard_normal((2, 6)).astype("f"), random.standard_normal(6).astype("f")],
        "CastLike": [random.standard_normal((2, 6)).astype("f"), np.zeros(1, np.float64)],
        "Shrink": [random.standard_normal((2, 6)).astype("f")],
    }[op]
    model = one_node(op, values, {}, 1, 23)
    inputs = [torch.from_numpy(v) for v in values]
    result = run(model, *inputs)
    monkeypatch.setitem(rules.RULES, ("", op), {})
    torch.testing.assert_close(run(model, *inputs), result)
    if op == "Attention":
        torch.testing.assert_close(result, torch.nn.functional.scaled_dot_product_attention(*inputs))


def test_a_rule_may_leave_a_use_to_the_definition() -> None:
    """Mean and deviation of a LayerNormalization: its rule computes one output only."""
    values = [np.random.default_rng(0).standard_normal((2, 6)).astype("f"), np.ones(6, "f")]
    _, mean, inverse = run(one_node("LayerNormalization", values, {}, 3, 17), *map(torch.from_numpy, values))
    torch.testing.assert_close(mean, torch.from_numpy(values[0]).mean(1, keepdim=True))
    torch.testing.assert_close(inverse, (torch.from_numpy(values[0]).var(1, correction=0, keepdim=True) + 1e-5).rsqrt())


WEIGHTS = """g (float[2, 3] x) => (float[2, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> {
    t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }"""


def test_what_is_computed_of_parameters_follows_them() -> None:
    """A mask that a pruner puts on a weight counts, too, where the file transposes the weight first."""
    model = OnnxModel(parsed(WEIGHTS), {})
    x = torch.eye(2, 3)
    assert dict(model.named_parameters()).keys() == {"w"}
    assert model(x).tolist() == [[1, 4], [2, 5]]
    other = copy.deepcopy(model)
    torch.nn.utils.prune.custom_from_mask(model, "w", torch.tensor([[1, 0, 1], [0, 1, 1]]))
    assert model(x).tolist() == [[1, 0], [0, 5]] and other(x).tolist() == [[1, 4], [2, 5]]
    assert capture(model, (x,))(x).tolist() == [[1, 0], [0, 5]]


def test_shapes_are_numbers() -> None:
    model = parsed("""g (float[2, 3, 4] x) => (float[6, 4] y, int64[3] s, int64 n) {
        s = Shape(x) n = Size(x) last = Shape<start = -1>(x) minus = Constant<value = int64[1] {-1}> ()
        shape = Concat<axis = 0>(minus, last) y = Reshape(x, shape) }""")
    y, sizes, count = run(model, torch.zeros(2, 3, 4))
    assert y.shape == (6, 4) and sizes.tolist() == [2, 3, 4] and count == 24
    assert sizes.dtype == count.dtype == torch.int64
    program = capture(OnnxModel(model, {}), (torch.zeros(2, 3, 4),))
    assert "sym_size" not in program.text()


def test_external_data(tmp_path: Path) -> None:
    model = parsed(WEIGHTS)
    (weight,) = model.graph.initializer
    weight.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(weight), "w")
    )  # as bytes, which alone are written elsewhere
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    assert (tmp_path / "m.bin").exists()
    assert read_onnx(path)(torch.eye(2, 3)).tolist() == [[1, 4], [2, 5]]
    (tmp_path / "m.bin").unlink()
    with pytest.raises(CaptureError, match=r"m\.onnx is no ONNX model: .*m\.bin"):
        read_onnx(path)


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]], ids=["linear", "coordinates"])
def test_sparse_initializers(indices: list, tmp_path: Path) -> None:
    model = parsed("g (float[2, 3] x) => (float[2, 3] y) { y = Add(x, w) }")
    values = numpy_helper.from_array(np.array([7.0, 8.0], "f"), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array(indices), "w_indices"), [2, 3])
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, tmp_path / "m.onnx")
    assert read_onnx(tmp_path / "m.onnx")(torch.zeros(2, 3)).tolist() == [[0, 7, 0], [0, 0, 8]]


def test_weights_of_four_bits() -> None:
    """Packed two to a byte in the file, with a scale for each block."""
    weight = helper.make_tensor("w", TensorProto.INT4, [2, 4], [-8, 7, 1, 0, 2, -3, 4, 5])
    scale = numpy_helper.from_array(np.array([[0.5, 2], [1, 10]], "f"), "s")
    model = parsed(
        "g (float[2, 4] x) => (float[2, 4] y) { d = DequantizeLinear<axis = 1, block_size = 2>(w, s) y = Add(x, d) }",
        21,
    )
    model.graph.initializer.extend([weight, scale])
    assert run(model, torch.zeros(2, 4)).tolist() == [[-4, 3.5, 2, 0], [2, -3, 40, 50]]


def test_values_of_inputs_that_are_fixed() -> None:
    model = parsed("g (float[2, 3] x, int64[1] k) => (float[2, k] y, int64[2, k] i) { y, i = TopK(x, k) }")
    x = torch.arange(6.0).reshape(2, 3)
    for k in (2, [2], np.array([2]), torch.tensor([2]), 2.0):
        assert run(model, x, k=k)[0].tolist() == [[2, 1], [5, 4]]
    with pytest.raises(CaptureError, match=r"the input 'k' is of type torch.int64, which does not have 2\.5"):
        run(model, x, k=2.5)
    with pytest.raises(CaptureError, match="the model has no input 'n'; its inputs: x, k"):
        run(model, x, n=2)
    with pytest.raises(CaptureError, match=r"the input 'x' is of type torch\.float32, and got torch\.float64"):
        run(model, x.double(), k=2)


def test_an_input_with_a_default_can_be_fixed() -> None:
    model = parsed("g (float[3] x, float[3] w) => (float[3] y) <float[3] w = {1, 2, 3}> { y = Mul(x, w) }")
    assert run(model, X).tolist() == [1, -4, 9] and run(model, X, w=[2.0, 2.0, 2.0]).tolist() == [2, -4, 6]


def test_what_torch_cannot_compute_is_named() -> None:
    with pytest.raises(CaptureError, match=r"node 'y0' \(MatMul\): torch cannot compute it: "):
        run(one_node("MatMul", [np.zeros((2, 3), "f")] * 2, {}, 1, 13), torch.zeros(2, 3), torch.zeros(2, 3))


def test_another_type_than_that_of_the_specification_is_refused(monkeypatch) -> None:
    def relu(x: torch.Tensor) -> torch.Tensor:
        return x.double()

    monkeypatch.setitem(rules.RULES, ("", "Relu"), {1: rules.Rule(relu)})
    with pytest.raises(CaptureError, match=r"computed in torch\.float64, and the specification has torch\.float32"):
        run(one_node("Relu", [np.zeros(3, "f")], {}, 1, 13), X)


def test_strings_are_refused() -> None:
    model = parsed('g (string[2] x) => (bool[2] y) { c = Constant<value = string {"a"}> () y = Equal(x, c) }', 19)
    with pytest.raises(CaptureError, match="elements of type STRING, which torch does not have"):
        OnnxModel(model, {})
