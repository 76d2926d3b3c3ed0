"""The zoo, dense and folded, against the others *on the same folded model*: interleaved in one process, medians and quartiles.

    python benchmarks/zoo.py [NAME ...] [--amounts 0 0.5] [--batches 1 8] [--against eager torch.compile onnxruntime openvino]

Contenders run what ``thresher.rewrite`` gives back: eager, ``torch.compile`` (default mode, and max-autotune), onnxruntime and OpenVINO
(from the same ``torch.onnx`` export, float32); on a GPU (``--device cuda``) eager and the two of torch.compile. ``masked`` is eager on the
model as the pruner left it, ``dense`` is Thresher on the unpruned model. A ratio says how many times as long the other takes. Writes the
machine, the versions, the build times and every ratio (the median over the rounds, in each of which all met the same neighbours), slow
rows included; rows of the same model, amount, batch and dtype are replaced, but for what contenders showed that did not take part again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.nn.utils import prune

import thresher
from thresher import models
from thresher.backends.tvm.cpu import cpu_name
from thresher.tuning.timing import interleaved
from thresher.verification.compare import compare

ZOO: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "resnet18": lambda: (models.resnet18(), (torch.randn(1, 3, 224, 224),)),
    "resnet50": lambda: (models.resnet50(), (torch.randn(1, 3, 224, 224),)),
    "mobilenet_v2": lambda: (models.MobileNetV2(), (torch.randn(1, 3, 224, 224),)),
    "efficientnet_b0": lambda: torchvision_model("efficientnet_b0"),
    "vit_tiny": lambda: (models.ViT(), (torch.randn(1, 3, 224, 224),)),
    "vit_small": lambda: (models.ViT(dim=384, heads=6), (torch.randn(1, 3, 224, 224),)),
    "bert_layer": lambda: (models.BertEncoder(vocabulary=1000, depth=1), (torch.randint(0, 1000, (1, 128)),)),
    "minilm": lambda: (
        models.BertEncoder(dim=384, depth=6, heads=12, hidden=1536),
        (torch.randint(0, 1000, (1, 128)),),
    ),
    "bert_4_layers": lambda: (models.BertEncoder(depth=4), (torch.randint(0, 1000, (1, 128)),)),
    "llama_prefill": lambda: (models.Llama(dim=512, hidden=1376), (torch.randint(0, 1000, (1, 128)),)),
    "unet": lambda: (models.UNet(), (torch.randn(1, 3, 128, 128),)),
    "lista": lambda: (models.LISTA(threshold=0.01), (torch.randn(64, 256),)),
}
HIDDEN = {
    "resnet18": ("conv1",),
    "resnet50": ("conv1", "conv2"),
    "mobilenet_v2": (".0.0",),
    "efficientnet_b0": (".block.0.0",),
    "vit_tiny": ("mlp.0",),
    "vit_small": ("mlp.0",),
    "bert_layer": ("up",),
    "minilm": ("up",),
    "bert_4_layers": ("up",),
    "llama_prefill": ("gate_proj", "up_proj"),
    "unet": ("down", "merge"),
}


def prepare(name: str, amount: float) -> tuple[nn.Module, tuple]:
    """The model with usable batch-norm statistics, ``amount`` of its hidden channels masked."""
    torch.manual_seed(0)
    model, args = ZOO[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    if amount:
        modules = dict(model.named_modules())
        for path, module in modules.items():
            if (
                isinstance(module, (nn.Conv2d, nn.Linear))
                and any(h in path for h in HIDDEN.get(name, ()))
                and path != "conv1"
            ):
                prune.random_structured(module, "weight", amount, dim=0)
                dead = (module.weight == 0).flatten(1).all(1)
                for beside in (f"{path[:-1]}1", f"{path[:-3]}1.1") if path.endswith(".0") else ():
                    norm = modules.get(
                        beside
                    )  # of the layer, and of the depthwise one behind it: else the channel is not 0
                    if isinstance(norm, nn.BatchNorm2d) and norm.num_features == len(dead):
                        with torch.no_grad():
                            norm.weight[dead] = norm.bias[dead] = 0
    return model.eval(), args


def torchvision_model(name: str) -> tuple[nn.Module, tuple]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from helpers.architectures import build

    return build("torchvision", name)[0], (torch.randn(1, 3, 224, 224),)


def inductor(model: nn.Module, args: tuple, folder: Path, mode: str = "default") -> Callable:
    inductor_config.force_disable_caches = True  # a build is a build: what an earlier run left does not count
    # on the CPU only frozen weights are given to the autotuner; options of this build alone: the other one must stay as it is
    options = {**torch._inductor.list_mode_options(mode), "freezing": mode == "max-autotune"}
    compiled = torch.compile(model, options=options)
    compiled(*args)
    return partial(compiled, *args)


def exported(model: nn.Module, args: tuple, folder: Path) -> Path:
    path = folder / "model.onnx"
    if not path.exists():
        torch.onnx.export(model, args, path, dynamo=True, verbose=False)
    return path


def onnxruntime(model: nn.Module, args: tuple, folder: Path) -> Callable:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(exported(model, args, folder)), options, providers=["CPUExecutionProvider"])
    feed = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args)}
    return lambda: [torch.from_numpy(o) for o in session.run(None, feed)]


def openvino(model: nn.Module, args: tuple, folder: Path) -> Callable:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(str(exported(model, args, folder)), "CPU", settings).create_infer_request()
    feed = [a.numpy() for a in args]
    return lambda: [torch.from_numpy(v) for v in request.infer(feed).values()]


AGAINST: dict[str, Callable[[nn.Module, tuple, Path], Callable]] = {
    "eager": lambda model, args, folder: partial(model, *args),
    "torch.compile": inductor,
    "max-autotune": partial(inductor, mode="max-autotune"),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


@dataclass(frozen=True)
class Place:
    """Where a model runs, and in which precision."""

    device: str
    dtype: str

    def put(self, model: nn.Module, args: tuple) -> tuple[nn.Module, tuple]:
        dtype = getattr(torch, self.dtype)
        args = tuple(a.to(self.device, dtype if a.is_floating_point() else a.dtype) for a in args)
        return model.to(self.device, dtype), args

    def waiting(self, call: Callable) -> Callable:
        """``call``, and on a GPU the end of its work."""
        if self.device == "cpu":
            return call

        def whole() -> None:
            call()
            torch.cuda.synchronize()

        return whole

    def name(self) -> dict[str, Any]:
        if self.device == "cuda":
            return {"gpu": torch.cuda.get_device_name()}
        return {"llvm": cpu_name(), "threads": torch.get_num_threads()}

    def results(self) -> Path:
        """The file of this machine's rows: those of machines are not comparable."""
        machine = cpu_name() if self.device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
        return Path(__file__).parent / "results" / f"zoo-{machine}.json"


def peak_allocated(call: Callable) -> float:
    """Megabytes that a call holds at most, of those it takes from torch's allocator: intermediate values and results."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0) / 1e6


def measure(name: str, amount: float, batch: int, place: Place, against: list[str], rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    model, args = prepare(name, amount)
    model, args = place.put(model, tuple(a.repeat(batch, *[1] * (a.dim() - 1)) for a in args))
    start = time.perf_counter()
    target = "cpu" if place.device == "cpu" else None  # the GPU that is there
    compiled = thresher.compile(model, args, target=target, validate="off", tune="never")
    report, build = compiled.report, {"thresher": time.perf_counter() - start}
    contenders: dict[str, Callable] = {"thresher": partial(compiled, *args)}
    if amount:
        contenders["masked"] = partial(model, *args)
        dense, _ = place.put(prepare(name, 0.0)[0], ())
        built = thresher.compile(dense, args, target=target, validate="off", tune="never")
        contenders["dense"] = partial(built, *args)
    small = thresher.rewrite(model, args, verify="off").eval().requires_grad_(False)
    failed = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for other in against:
            start = time.perf_counter()
            try:
                contenders[other] = AGAINST[other](small, args, Path(folder))
            except Exception as error:
                failed[other] = f"{type(error).__name__}: {str(error)[:200]}"
            build[other] = time.perf_counter() - start
        leaves = torch.utils._pytree.tree_leaves
        error = compare(leaves(model(*args)), leaves(compiled(*args))).relative
        megabytes = {"thresher": report.memory.get("activations", 0) / 1e6}
        if place.device == "cpu":
            megabytes |= {k: peak_allocated(contenders[k]) for k in ("eager", "torch.compile") if k in contenders}
        timings = interleaved({k: place.waiting(call) for k, call in contenders.items()}, rounds=rounds)
    return {
        "model": name,
        "masked": amount,
        "batch": batch,
        "dtype": place.dtype,
        "parameters": [report.before.parameters, report.after.parameters],
        "flops": [report.before.flops, report.after.flops],
        "estimate": round(report.estimate, 3),
        "error": error,
        "failed": failed,
        "megabytes": {k: round(v, 3) for k, v in megabytes.items()},
        "build_seconds": {k: round(v, 2) for k, v in build.items()},
        "milliseconds": {k: [round(t.low, 3), round(t.median, 3), round(t.high, 3)] for k, t in timings.items()},
        "ratio": {k: round(t.over(timings["thresher"]), 3) for k, t in timings.items() if k != "thresher"},
    }


def write(path: Path, row: dict[str, Any], place: Place) -> None:
    """Put one row into the file: a run that is stopped keeps what it measured."""
    packages = (
        "thresher",
        "torch",
        "apache-tvm",
        *(("onnxruntime", "openvino") if place.device == "cpu" else ("triton",)),
    )
    here = {"machine": place.name(), "versions": {p: version(p) for p in packages}}
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(
        before.get(k) == v for k, v in here.items()
    )  # rows of other machines and versions are not mixed with these
    rows = {key(r): r for r in before["rows"]} if same else {}
    for part in ("ratio", "milliseconds", "build_seconds", "megabytes"):
        row[part] = {**rows.get(key(row), {}).get(part, {}), **row[part]}
    rows[key(row)] = row
    order = sorted(rows.values(), key=lambda r: (r["batch"], list(ZOO).index(r["model"]), r["masked"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**here, "rows": order}, indent=1) + "\n")


def key(row: dict[str, Any]) -> tuple:
    return row["model"], row["masked"], row["batch"], row["dtype"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--amounts", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="*", default=["float32"], choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--against", nargs="*", default=list(AGAINST), choices=list(AGAINST))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, help="default: results/zoo-MACHINE.json")
    options = parser.parse_args()
    rows = itertools.product(options.names, options.batches, options.amounts, options.dtypes)
    for name, batch, amount, dtype in rows:
        place = Place(options.device, dtype)
        row = measure(name, amount, batch, place, options.against, options.rounds)
        write(options.output or place.results(), row, place)
        ratios = "  ".join(f"{k} {v:.2f}x" for k, v in row["ratio"].items())
        taken = row["milliseconds"]["thresher"][1]
        print(
            f"{name:14s} x{batch} masked {amount:.0%}: {taken:8.2f} ms  {ratios}  error {row['error']:.1e}", flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
