"""ONNX in and out: every operator against onnx's reference, real files against onnxruntime, folded models read back."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from torch import nn

import thresher
from thresher.cli import main as cli
from thresher.errors import CaptureError, ThresherError, ValidationError
from thresher.exporters.onnx import write_onnx
from thresher.frontend.onnx.operators import RULES
from thresher.frontend.onnx.reader import read_onnx
from thresher.testing import ZOO, mask_channels, settle
from thresher.verification.compare import compare

FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def integers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(-128, 128, shape, dtype=np.int8)


def unsigned(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def one_node(
    op: str, values: list, constants: dict[int, np.ndarray], outputs: int, opset: int, **attributes: Any
) -> Any:
    """A model of one node; ``values`` are its inputs, None for what is left out; ``constants`` are among them by place."""
    names = ["" if v is None else f"x{i}" for i, v in enumerate(values)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for i, (n, v) in enumerate(zip(names, values))
        if n and i not in constants
    ]
    results = [onnx.ValueInfoProto(name=f"y{i}") for i in range(outputs)]
    initial = [numpy_helper.from_array(v, f"x{i}") for i, v in constants.items()]
    graph = helper.make_graph([node], "one", inputs, results, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, check_type=True)


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
    ("QLinearConv", q := [PIXELS, F(0.02), U8(100), integers(4, 3, 3, 3), np.array([0.1, 0.2, 0.05, 0.3], "f"), np.zeros(4, "i1"), F(1.1),
                          U8(128), np.array([5, -900, 3000, 0], "i4")], dict(enumerate(q[1:], 1)), {"pads": [1, 1, 1, 1]}, 10),
]  # fmt: skip
BY_ONNXRUNTIME = """LSTM GRU RNN QLinearConv DequantizeLinear DynamicQuantizeLinear Resize BatchNormalization AveragePool MaxPool
HardSwish""".split()
NOT_ALONE = {
    "Dropout",
    "ConstantOfShape",
    "Range",
    "Mod",
}  # of other inputs than constants they are refused, or are nothing


@pytest.mark.parametrize("place", range(len(NODES)), ids=lambda i: f"{NODES[i][0]}-{i}")
def test_operators(place: int, tmp_path: Path) -> None:
    """As onnx's reference computes it; as onnxruntime does, where the reference has a defect (recurrent layers, old opsets)."""
    op, values, constants, attributes, opset, outputs = (*NODES[place], *[13, 1][len(NODES[place]) - 4 :])
    model = one_node(op, values, constants, outputs, opset, **attributes)
    onnx.save(model, tmp_path / "one.onnx")
    given = {f"x{i}": np.asarray(v) for i, v in enumerate(values) if v is not None and i not in constants}
    if op in BY_ONNXRUNTIME or opset < 13:
        wanted = onnxruntime.InferenceSession(tmp_path / "one.onnx").run(None, given)
    else:
        wanted = ReferenceEvaluator(model).run(None, given)
    with torch.no_grad():
        found = read_onnx(tmp_path / "one.onnx")(*(torch.from_numpy(v) for v in given.values()))
    found = found if isinstance(found, tuple) else (found,)
    assert [str(f.dtype).removeprefix("torch.") for f in found] == [str(np.asarray(w).dtype) for w in wanted]
    assert not compare([torch.from_numpy(np.array(w)) for w in wanted], list(found)).exceeds(2e-6)


def test_every_rule_is_tried() -> None:
    assert RULES.keys() - {node[0] for node in NODES} == NOT_ALONE


def real(package: str, place: str) -> Path:
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return Path(folder) / place


def image(height: int, width: int) -> torch.Tensor:
    """Black writing on white, more or less."""
    x = torch.ones(1, 3, height, width)
    x[:, :, height // 3 : 2 * height // 3, ::7] = -1.0
    return x


STATE, TONE = torch.zeros(2, 1, 128), torch.sin(torch.arange(576.0))[None]
FILES: dict[str, tuple[Path, tuple, dict]] = {
    "text angle": (real("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"), (image(48, 192),), {}),
    "text detection": (real("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"), (image(64, 96),), {}),
    "text recognition": (real("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"), (image(48, 96),), {}),
    "file types": (real("magika", "models/standard_v3_3/model.onnx"), (torch.arange(2048, dtype=torch.int32)[None] % 257,), {}),
    "voice": (real("silero_vad", "data/silero_vad.onnx"), (TONE, STATE), {"sr": 16000}),
    "voice, without branches": (real("silero_vad", "data/silero_vad_op18_ifless.onnx"), (TONE, STATE), {"sr": 16000}),
}  # fmt: skip


def by_onnxruntime(path: Path, args: tuple, fixed: dict) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    names = [i.name for i in session.get_inputs() if i.name not in fixed]
    given = {n: a.numpy() for n, a in zip(names, args)} | {k: np.array(v) for k, v in fixed.items()}
    return [torch.from_numpy(w) for w in session.run(None, given)]


@pytest.mark.parametrize("name", FILES)
def test_real_files_are_read(name: str) -> None:
    path, args, fixed = FILES[name]
    with torch.no_grad():
        found = read_onnx(path, fixed)(*args)
    for a, b in zip(by_onnxruntime(path, args, fixed), found if isinstance(found, tuple) else (found,), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["file types", "voice"])
def test_real_files_are_compiled(name: str) -> None:
    path, args, fixed = FILES[name]
    compiled = thresher.compile(read_onnx(path, fixed), args, target="cpu")
    found = compiled(*args)
    for a, b in zip(by_onnxruntime(path, args, fixed), found if isinstance(found, tuple) else (found,), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_dynamically_quantised_model(tmp_path: Path) -> None:
    """Magika, made by onnxruntime's own tool: whole numbers are summed exactly, and steps of rounding are allowed for by measure."""
    path, args, _ = FILES["file types"]
    quantize_dynamic(path, tmp_path / "q.onnx")
    assert {"MatMulInteger", "ConvInteger"} <= {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    compiled = thresher.compile(read_onnx(tmp_path / "q.onnx"), args, target="cpu")
    (wanted,) = by_onnxruntime(tmp_path / "q.onnx", args, {})
    found = compiled(*args)
    assert compare([wanted], [found]).relative < 0.01
    assert (
        max(c.tolerance for c in compiled.report.checks) > 1e-4
    )  # of an input some of whose values lie next to a step
    assert thresher.load(compiled.save(tmp_path / "q.thresher")).validate()[0].passed


def test_a_statically_quantised_model(tmp_path: Path) -> None:
    """Quantised and back between all operators: to the last step what onnxruntime computes where it merges none of them."""

    class Images(CalibrationDataReader):
        left = iter([{"x": np.random.default_rng(0).standard_normal((1, 3, 48, 64)).astype("f")}])

        def get_next(self) -> dict | None:
            return next(self.left, None)

    source = real("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    quantize_static(source, tmp_path / "q.onnx", Images(), quant_format=QuantFormat.QDQ, per_channel=True)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 3, 48, 64)).astype("f"))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    (wanted,) = onnxruntime.InferenceSession(tmp_path / "q.onnx", options).run(None, {"x": x.numpy()})
    with torch.no_grad():
        found = read_onnx(tmp_path / "q.onnx")(x)
    assert np.abs(found.numpy() - wanted).max() <= 2 / 255


@pytest.mark.parametrize("after", [lambda y: y, lambda y: y.relu(), lambda y: y * stepped(y + 1.5)])
def test_steps_behind_each_other_are_compiled(after: Callable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return stepped(after(stepped(self.conv(x))))

    thresher.compile(Model().eval(), (torch.randn(1, 3, 12, 12),), target="cpu")  # it validates itself


def stepped(x: torch.Tensor) -> torch.Tensor:
    """Quantised to 8 bits and back."""
    steps = torch.clamp(torch.round(x / 0.05) + 3, -128, 127).to(torch.int8)
    return (steps.to(torch.int32) - 3).to(torch.float32) * 0.05


@pytest.mark.parametrize("name", ["resnet18", "vit", "bert_masked", "lista"])
def test_folded_models_are_written_and_read_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args = ZOO[name]()
    model = mask_channels(settle(model), 0.5)
    small = thresher.rewrite(model, args)
    path = write_onnx(small, args, tmp_path / "small.onnx")
    wanted = torch.utils._pytree.tree_leaves(model(*args))
    found = by_onnxruntime(path, args, {})
    assert not compare(wanted, found).exceeds(1e-4)
    kept = sum(v.numel() for v in small.state_dict().values())
    stored = sum(np.prod(t.dims) for t in onnx.load(path).graph.initializer if t.data_type == FLOAT)
    assert stored < 1.1 * kept + 2000
    with torch.no_grad():
        again = read_onnx(path)(*args)
    assert not compare(wanted, torch.utils._pytree.tree_leaves(again)).exceeds(1e-4)


def test_command_line(tmp_path: Path, capsys) -> None:
    path, _, _ = FILES["file types"]
    out = tmp_path / "types.thresher"
    assert cli.main(["build", str(path), "-o", str(out), "--target", "cpu"]) == 1
    assert "leaves sizes open (bytes[unk__214, 2048]); describe its inputs with --input" in capsys.readouterr().err
    small = tmp_path / "types.onnx"
    words = ["build", str(path), "-o", str(out), "--input", "1x2048:int32", "--target", "cpu", "--onnx", str(small)]
    assert cli.main(words) == 0 and out.exists() and small.exists()
    assert thresher.load(out).validate()[0].passed
    assert cli.main(["build", str(FILES["voice"][0]), "--fixed", "rate=16000"]) == 1
    assert "has no input 'rate'; its inputs: input, state, sr" in capsys.readouterr().err


def test_bad_files_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    with pytest.raises(CaptureError, match="does not exist"):
        read_onnx(bad)
    bad.write_bytes(b"not a model")
    with pytest.raises(CaptureError, match="is no ONNX model"):
        thresher.capture(bad)
    unknown = one_node("NonMaxSuppression", [rand(1, 4, 4), rand(1, 1, 4)], {}, 1, 13)
    onnx.save(unknown, bad)
    with pytest.raises(CaptureError, match="operators that are not known here: NonMaxSuppression"):
        read_onnx(bad)
    graph = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 13, "elsewhere" : 1]>
        g (float[2] x) => (float[2] y) { y = elsewhere.Relu(x) }""")
    onnx.save(graph, bad)
    with pytest.raises(
        CaptureError, match=r"not known here: elsewhere\.Relu"
    ):  # it is not what the specification calls Relu
        read_onnx(bad)
    with pytest.raises(CaptureError, match=r"'If_0' \(If\): its condition depends on values"):
        read_onnx(FILES["voice"][0])(torch.randn(1, 576), STATE, torch.tensor(16000))
    with pytest.raises(CaptureError, match=r"takes 2 inputs \(input, state\), and got 1"):
        read_onnx(FILES["voice"][0], {"sr": 16000})(torch.randn(1, 576))
    onnx.save(one_node("TopK", [A, ints(2)], {}, 2, 13), bad)
    with pytest.raises(CaptureError, match=r"\(TopK\): its k depends on values"):
        read_onnx(bad)(torch.from_numpy(A), torch.tensor([2]))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (("LayerNormalization", [A, rand(4)], {1: rand(4)}, 3, 17), "its output 'y1' is asked for"),
        (("AveragePool", [IMAGE], {}, 1, 19, {"kernel_shape": [2, 2], "dilations": [2, 2]}), "dilations"),
        (("ArgMin", [A], {}, 1, 13, {"select_last_index": 1}), "the last of equal ones"),
        (("ScatterElements", [A, np.array([[0]]), rand(1, 1)], {}, 1, 16, {"reduction": "add"}), "the reduction add"),
        (("MaxPool", [IMAGE], {}, 2, 13, {"kernel_shape": [2, 2]}), "the places of the largest"),
    ],
)
def test_uses_that_are_not_known_are_refused(node: tuple, words: str, tmp_path: Path) -> None:
    *arguments, attributes = node if isinstance(node[-1], dict) else (*node, {})
    onnx.save(one_node(*arguments, **attributes), tmp_path / "one.onnx")
    with pytest.raises(CaptureError, match=words):
        read_onnx(tmp_path / "one.onnx")(
            *(torch.from_numpy(v) for i, v in enumerate(arguments[1]) if i not in arguments[2])
        )


def test_what_is_written_wrongly_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    model, args = nn.Linear(3, 4), (torch.randn(2, 3),)
    monkeypatch.setattr("thresher.exporters.onnx.LOWERING_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(ValidationError, match="onnxruntime computes something else"):
        write_onnx(thresher.rewrite(model, args), args, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ThresherError, match="cannot write"):
        monkeypatch.undo()
        write_onnx(thresher.rewrite(model, args), args, Path("/proc/x.onnx"))
