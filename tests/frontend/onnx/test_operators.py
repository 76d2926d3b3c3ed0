"""Uses of operators that ONNX's own tests leave out: old opsets, unequal padding, recurrent layers in both directions, quantised sums.

They are computed as onnx's reference computes them; as onnxruntime does, where the reference has a defect (recurrent layers, old opsets).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from helpers.onnx_cases import one_node, run
from thresher.verification.compare import compare

INT = TensorProto.INT64


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-128, 128, shape, dtype=np.int8)


def unsigned(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


A, B, IMAGE, SEQ = rand(3, 4), rand(3, 4), rand(2, 3, 6, 8), rand(5, 2, 4)
POSITIVE = np.abs(A) + 0.1
F, U8, I8 = np.float32, np.uint8, np.int8
BYTES, SIGNED, LONG, PIXELS, DEEP = (
    unsigned(4, 5),
    integers(3, 4),
    unsigned(2, 600),
    unsigned(2, 3, 6, 7),
    unsigned(1, 40, 4, 5),
)
#: (operator, inputs, constants by place, attributes[, opset[, outputs]])
NODES: list[tuple] = [
    *((op, [A], {}, {}) for op in "Relu Sigmoid Tanh Exp Neg Abs Floor Ceil Round Sign Erf Sin Cos Softplus Selu".split()),
    *((op, [POSITIVE], {}, {}) for op in "Log Sqrt Reciprocal".split()),
    *((op, [A, B], {}, {}) for op in "Add Sub Mul Div Max Min Sum Greater GreaterOrEqual Less LessOrEqual Equal".split()),
    ("HardSwish", [A], {}, {}, 14), ("Mish", [A], {}, {}, 18),
    ("Div", [ints(7, -7, 5), ints(2, 2, 3)], {}, {}),
    ("And", [A > 0, B > 0], {}, {}), ("Or", [A > 0, B > 0], {}, {}), ("Not", [A > 0], {}, {}), ("Where", [A > 0, A, B], {}, {}),
    ("MatMul", [rand(2, 3, 4), rand(4, 5)], {}, {}), ("Pow", [POSITIVE, np.float32(2.5)], {1: np.float32(2.5)}, {}),
    ("Pow", [POSITIVE, B], {}, {}),
    ("Gemm", [A, rand(5, 4), rand(5)], {1: rand(5, 4), 2: rand(5)}, {"transB": 1}),
    ("Gemm", [rand(4, 3), rand(4, 5), rand(3, 5)], {}, {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("LeakyRelu", [A], {}, {"alpha": 0.2}), ("Elu", [A], {}, {"alpha": 0.7}), ("Celu", [A], {}, {"alpha": 0.7}),
    ("ThresholdedRelu", [A], {}, {"alpha": 0.3}), ("HardSigmoid", [A], {}, {"alpha": 0.3, "beta": 0.4}),
    ("PRelu", [A, rand(4)], {1: rand(4)}, {}),
    ("Clip", [A, np.float32(-0.5), np.float32(0.5)], {1: np.float32(-0.5), 2: np.float32(0.5)}, {}),
    ("Clip", [A, None, np.float32(0.5)], {2: np.float32(0.5)}, {}), ("Clip", [A], {}, {"min": -0.5, "max": 0.25}, 6),
    ("Gelu", [A], {}, {}, 20), ("Gelu", [A], {}, {"approximate": "tanh"}, 20), ("Cast", [A], {}, {"to": INT}), ("IsNaN", [A], {}, {}),
    ("Conv", [IMAGE, rand(4, 3, 3, 3), rand(4)], {1: rand(4, 3, 3, 3), 2: rand(4)}, {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", [IMAGE, rand(4, 3, 3, 3)], {1: rand(4, 3, 3, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [IMAGE, rand(4, 3, 2, 2)], {1: rand(4, 3, 2, 2)}, {"auto_pad": "SAME_LOWER"}),
    ("Conv", [IMAGE, rand(3, 1, 3, 3)], {1: rand(3, 1, 3, 3)}, {"group": 3, "dilations": [2, 1], "pads": [0, 1, 2, 0]}),
    ("Conv", [rand(2, 3, 9), rand(4, 3, 3)], {1: rand(4, 3, 3)}, {"pads": [1, 1]}),
    ("ConvTranspose", [IMAGE, rand(3, 4, 2, 2)], {1: rand(3, 4, 2, 2)}, {"strides": [2, 2]}),
    ("ConvTranspose", [IMAGE, rand(3, 4, 3, 3)], {1: rand(3, 4, 3, 3)}, {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    ("MaxPool", [IMAGE], {}, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    ("MaxPool", [IMAGE], {}, {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
    ("MaxPool", [IMAGE], {}, {"kernel_shape": [4, 3], "ceil_mode": 1, "strides": [2, 2]}),
    ("AveragePool", [IMAGE], {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], {}, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", [IMAGE], {}, {}), ("GlobalMaxPool", [IMAGE], {}, {}),
    ("BatchNormalization", [IMAGE, *(v := [rand(3), rand(3) + 1, rand(3), np.abs(rand(3))])], dict(enumerate(v, 1)), {"epsilon": 1e-3}),
    ("InstanceNormalization", [IMAGE, rand(3), rand(3) + 1], {}, {}),
    ("LayerNormalization", [A, rand(4), rand(4) + 1], {1: rand(4), 2: rand(4) + 1}, {}, 17),
    ("LayerNormalization", [A, rand(4)], {1: rand(4)}, {"epsilon": 0.1}, 17),
    ("Softmax", [IMAGE], {}, {"axis": 1}), ("Softmax", [IMAGE], {}, {"axis": 1}, 11), ("LogSoftmax", [A], {}, {"axis": -1}),
    ("Reshape", [IMAGE, ints(0, -1, 8)], {1: ints(0, -1, 8)}, {}), ("Flatten", [IMAGE], {}, {"axis": 2}),
    ("Flatten", [IMAGE], {}, {"axis": -1}),
    ("Transpose", [IMAGE], {}, {"perm": [0, 2, 3, 1]}), ("Transpose", [A], {}, {}), ("Concat", [A, B], {}, {"axis": 1}),
    ("Squeeze", [rand(1, 3, 1)], {}, {"axes": [0]}, 11), ("Squeeze", [rand(1, 3, 1), ints(2)], {1: ints(2)}, {}),
    ("Squeeze", [rand(1, 3, 1)], {}, {}),
    ("Unsqueeze", [A, ints(0, -1)], {1: ints(0, -1)}, {}), ("Unsqueeze", [A], {}, {"axes": [1, 3]}, 11),
    ("Slice", [IMAGE, ints(1, 0), ints(5, -1), ints(2, 3), ints(2, 1)], {1: ints(1, 0), 2: ints(5, -1), 3: ints(2, 3), 4: ints(2, 1)}, {}),
    ("Slice", [A, ints(-1), ints(-9), ints(1), ints(-1)], {1: ints(-1), 2: ints(-9), 3: ints(1), 4: ints(-1)}, {}),
    ("Slice", [A], {}, {"starts": [1], "ends": [99], "axes": [1]}, 9),
    ("Split", [IMAGE, ints(2, 6)], {1: ints(2, 6)}, {"axis": 3}, 17, 2), ("Split", [IMAGE], {}, {"axis": 3}, 13, 4),
    ("Split", [A], {}, {"axis": 1, "split": [1, 3]}, 11, 2),
    ("Gather", [A, ints(2, -1, 0)], {1: ints(2, -1, 0)}, {}), ("Gather", [IMAGE, np.array([[1, 0], [2, 2]])], {}, {"axis": 1}),
    ("Gather", [A, np.array(1)], {1: np.array(1)}, {"axis": 1}), ("Gather", [A, np.array(1)], {0: A}, {}),
    ("GatherElements", [A, np.array([[0, 1], [3, 2], [1, 1]])], {}, {"axis": 1}),
    ("ScatterElements", [A, np.array([[0, -1]]), rand(1, 2)], {}, {"axis": 1}),
    ("Expand", [rand(3, 1), ints(2, 1, 4)], {1: ints(2, 1, 4)}, {}), ("Tile", [A, ints(2, 3)], {1: ints(2, 3)}, {}),
    ("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 0), np.float32(1.5)], {1: ints(0, 0, 1, 2, 0, 0, 3, 0), 2: np.float32(1.5)}, {}),
    ("Pad", [IMAGE, ints(0, 0, 1, 2, 0, 0, 3, 0)], {1: ints(0, 0, 1, 2, 0, 0, 3, 0)}, {"mode": "reflect"}),
    ("Pad", [A, ints(0, 2, 0, 1)], {1: ints(0, 2, 0, 1)}, {"mode": "edge"}),
    ("Pad", [A, ints(2, 1), np.float32(0), ints(1)], {1: ints(2, 1), 2: np.float32(0), 3: ints(1)}, {}, 18),
    ("DepthToSpace", [rand(1, 8, 2, 3)], {}, {"blocksize": 2}), ("DepthToSpace", [rand(1, 8, 2, 3)], {}, {"blocksize": 2, "mode": "CRD"}),
    *(("Resize", [IMAGE, None, np.array([1, 1, s, s], np.float32)], {2: np.array([1, 1, s, s], np.float32)},
       {"mode": "nearest", "coordinate_transformation_mode": where, "nearest_mode": how})
      for where, how in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("asymmetric", "round_prefer_ceil"))
      for s in (2.0, 4.0, 1.5)),
    *(("Resize", [IMAGE, None, None, ints(2, 3, 9, 11)], {3: ints(2, 3, 9, 11)},
       {"mode": "linear", "coordinate_transformation_mode": where})
      for where in ("half_pixel", "align_corners")),
    *((op, [IMAGE], {}, {"axes": [1, -1], "keepdims": k}, 12)
      for op in "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceL1 ReduceSumSquare ReduceLogSumExp".split() for k in (0, 1)),
    ("ReduceSum", [IMAGE, ints(2)], {1: ints(2)}, {}), ("ReduceMean", [IMAGE], {}, {"keepdims": 0}),
    ("ReduceMax", [IMAGE, ints(2)], {1: ints(2)}, {}, 18),
    ("ArgMax", [A], {}, {"axis": 1}), ("ArgMin", [A], {}, {"axis": 0, "keepdims": 0}),
    ("TopK", [A, ints(2)], {1: ints(2)}, {"axis": 1}, 13, 2),
    ("CumSum", [A, np.array(1)], {1: np.array(1)}, {}), ("Einsum", [A, rand(4, 5)], {}, {"equation": "ij,jk->ki"}),
    ("Trilu", [rand(4, 4)], {}, {}, 14), ("Trilu", [rand(4, 4), np.array(1)], {1: np.array(1)}, {"upper": 0}, 14),
    ("Shape", [IMAGE], {}, {}), ("Size", [IMAGE], {}, {}), ("Shape", [IMAGE], {}, {"start": 1, "end": -1}, 15),
    *(("LSTM", [SEQ, w := rand(d, 12, 4), r := rand(d, 12, 3), b := rand(d, 24)], {1: w, 2: r, 3: b},
       {"hidden_size": 3, "direction": k}, 14, 3)
      for d, k in ((1, "forward"), (1, "reverse"), (2, "bidirectional"))),
    *(("GRU", [SEQ, w := rand(d, 9, 4), r := rand(d, 9, 3), b := rand(d, 18)], {1: w, 2: r, 3: b},
       {"hidden_size": 3, "direction": k, "linear_before_reset": before}, 14, 2)
      for d, k, before in ((1, "forward", 0), (1, "reverse", 1), (2, "bidirectional", 0), (2, "bidirectional", 1))),
    *(("RNN", [SEQ, w := rand(d, 3, 4), r := rand(d, 3, 3), b := rand(d, 6)], {1: w, 2: r, 3: b},
       {"hidden_size": 3, "direction": k, "activations": [a] * d}, 14, 2)
      for d, k, a in ((1, "forward", "Tanh"), (1, "reverse", "Relu"), (2, "bidirectional", "Tanh"))),
    ("QuantizeLinear", [A, F(0.1)], {1: F(0.1)}, {}), ("QuantizeLinear", [A, F(0.02), I8(3)], {1: F(0.02), 2: I8(3)}, {}),
    ("QuantizeLinear", [A, s := np.array([0.1, 0.2, 0.01, 1.0], "f"), z := np.arange(4, dtype="u1")], {1: s, 2: z}, {"axis": 1}),
    ("DequantizeLinear", [BYTES, F(0.1)], {1: F(0.1)}, {}), ("DequantizeLinear", [BYTES, F(0.1), U8(7)], {1: F(0.1), 2: U8(7)}, {}),
    ("DequantizeLinear", [SIGNED, s := np.array([0.1, 0.2, 0.3], "f"), z := np.array([1, -2, 0], "i1")], {1: s, 2: z}, {"axis": 0}),
    ("DynamicQuantizeLinear", [A], {}, {}, 13, 3), ("DynamicQuantizeLinear", [A + 100], {}, {}, 13, 3),
    ("DynamicQuantizeLinear", [0 * A], {}, {}, 13, 3),
    ("MatMulInteger", [LONG, w := integers(600, 4)], {1: w}, {}),
    ("MatMulInteger", [BYTES, w := integers(5, 4), U8(120), I8(-3)], {1: w, 2: U8(120), 3: I8(-3)}, {}),
    ("QLinearMatMul", q := [BYTES, F(0.02), U8(120), integers(5, 4), F(0.03), I8(-3), F(0.9), U8(128)], dict(enumerate(q[1:], 1)), {}),
    ("ConvInteger", [PIXELS, w := integers(4, 3, 3, 3)], {1: w}, {"pads": [1, 1, 1, 1]}),
    ("ConvInteger", [PIXELS, w := unsigned(3, 1, 3, 3), U8(9), U8(130)], {1: w, 2: U8(9), 3: U8(130)}, {"group": 3, "strides": [2, 2]}),
    ("ConvInteger", [DEEP, w := unsigned(2, 40, 3, 3)], {1: w}, {}),
]  # fmt: skip
BY_ONNXRUNTIME = "LSTM GRU RNN DequantizeLinear DynamicQuantizeLinear Resize BatchNormalization AveragePool MaxPool HardSwish".split()


@pytest.mark.parametrize("index", range(len(NODES)), ids=lambda i: f"{NODES[i][0]}-{i}")
def test_operators(index: int, tmp_path: Path) -> None:
    op, values, constants, attributes, opset, outputs = (*NODES[index], *[13, 1][len(NODES[index]) - 4 :])
    model = onnx.shape_inference.infer_shapes(
        one_node(op, values, constants, outputs, opset, **attributes), check_type=True
    )
    feeds = {f"x{i}": np.asarray(v) for i, v in enumerate(values) if v is not None and i not in constants}
    if op in BY_ONNXRUNTIME or opset < 13:
        onnx.save(model, tmp_path / "one.onnx")
        expected = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, feeds)
    else:
        expected = ReferenceEvaluator(model).run(None, feeds)
    result = run(model, *(torch.from_numpy(v) for v in feeds.values()))
    results = result if isinstance(result, tuple) else (result,)
    assert [str(r.dtype).removeprefix("torch.") for r in results] == [str(np.asarray(e).dtype) for e in expected]
    assert not compare([torch.from_numpy(np.array(e)) for e in expected], list(results)).exceeds(2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_quantised_convolution(seed: int) -> None:
    """As the definition computes it in float64; a number nearer than 1e-5 to the middle between two steps may fall on either.

    onnxruntime is no judge: on processors without VNNI its sums of products of uint8 saturate at 16 bits.
    """
    random = np.random.default_rng(seed)
    x, w = random.integers(0, 256, (2, 3, 6, 7), np.uint8), random.integers(-128, 128, (4, 3, 3, 3), np.int8)
    scales, bias = np.array([0.1, 0.2, 0.05, 0.3], F), np.array([5, -900, 3000, 0], np.int32)
    inputs = [x, F(0.02), U8(100), w, scales, np.zeros(4, I8), F(1.1), U8(128), bias]
    model = one_node("QLinearConv", inputs, dict(enumerate(inputs[1:], 1)), 1, 10, pads=[1, 1, 1, 1])
    result = run(model, torch.from_numpy(x)).to(torch.float64)
    image, kernel = (torch.from_numpy(v.astype(np.float64) - zero) for v, zero in ((x, 100), (w, 0)))
    sums = torch.nn.functional.conv2d(image, kernel, torch.from_numpy(bias).double(), padding=1)
    exact = sums * torch.from_numpy(scales.astype(np.float64) * float(F(0.02)) / float(F(1.1))).reshape(-1, 1, 1)
    near = ((exact - exact.floor()) - 0.5).abs() < 1e-5
    assert near.float().mean() < 0.01
    assert torch.equal(result[~near], (exact.round() + 128).clamp(0, 255)[~near])
    assert ((result - exact - 128).clamp(-128, 127)[near].abs() <= 0.51).all()
