"""ONNX in and out: real files against onnxruntime, folded models read back, and what is wrong with a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from torch import nn

import thresher
from helpers.onnx_cases import one_node
from thresher.cli import main as cli
from thresher.errors import CaptureError, ThresherError, ValidationError
from thresher.exporters.onnx import write_onnx
from thresher.frontend.onnx.reader import read_onnx
from thresher.testing import ZOO, mask_channels, settle
from thresher.verification.compare import compare


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
    stored = sum(np.prod(t.dims) for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
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


def save(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    with pytest.raises(CaptureError, match="does not exist"):
        read_onnx(bad)
    bad.write_bytes(b"not a model")
    with pytest.raises(CaptureError, match="is no ONNX model"):
        thresher.capture(bad)
    save(one_node("RandomNormalLike", [np.zeros(2, np.float32)], {}, 1, 13), bad)
    with pytest.raises(CaptureError, match=r"bad\.onnx: it has operators that are not known here: RandomNormalLike"):
        read_onnx(bad)
    graph = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 13, "elsewhere" : 1]>
        g (float[2] x) => (float[2] y) { y = elsewhere.Relu(x) }""")
    onnx.save(graph, bad)
    with pytest.raises(
        CaptureError, match=r"not known here: elsewhere\.Relu"
    ):  # it is not what the specification calls Relu
        read_onnx(bad)
    with pytest.raises(CaptureError, match=r"'If_0' \(If\): values of .* decide its condition"):
        read_onnx(FILES["voice"][0])(torch.randn(1, 576), STATE, torch.tensor(16000))
    with pytest.raises(CaptureError, match=r"takes 2 inputs \(input, state\), and got 1"):
        read_onnx(FILES["voice"][0], {"sr": 16000})(torch.randn(1, 576))
    save(one_node("TopK", [np.zeros((3, 4), np.float32), np.array([2])], {}, 2, 13), bad)
    cure = r"\(TopK\): values of x1 decide its k\. If .*: read_onnx\(path, fixed={'x1': \.\.\.}\), or --fixed x1="
    with pytest.raises(CaptureError, match=cure):
        thresher.capture(bad, (torch.zeros(3, 4), torch.tensor([2])))


def test_what_is_written_wrongly_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    model, args = nn.Linear(3, 4), (torch.randn(2, 3),)
    monkeypatch.setattr("thresher.exporters.onnx.LOWERING_TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(ValidationError, match="onnxruntime computes something else"):
        write_onnx(thresher.rewrite(model, args), args, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ThresherError, match="cannot write"):
        monkeypatch.undo()
        write_onnx(thresher.rewrite(model, args), args, Path("/proc/x.onnx"))
