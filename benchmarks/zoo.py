"""The zoo, dense and folded, against eager and torch.compile: interleaved in one process, medians and quartiles.

    python benchmarks/zoo.py [NAME ...] [--inductor NAME ...] [--output benchmarks/results/zoo-cpu.json]

Ratios say how much faster Thresher is (above 1) than the other on the *same* model. Writes the machine, the versions, the build times and
every ratio, slow rows included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
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
from thresher.backends.tvm.kernels.machine import cpu_name
from thresher.benchmark import interleaved
from thresher.validation import compare

ZOO: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "resnet18": lambda: (models.resnet18(), (torch.randn(1, 3, 224, 224),)),
    "resnet50": lambda: (models.resnet50(), (torch.randn(1, 3, 224, 224),)),
    "mobilenet_v2": lambda: (models.MobileNetV2(), (torch.randn(1, 3, 224, 224),)),
    "vit_tiny": lambda: (models.ViT(), (torch.randn(1, 3, 224, 224),)),
    "bert_4_layers": lambda: (models.BertEncoder(depth=4), (torch.randint(0, 1000, (1, 128)),)),
    "llama_prefill": lambda: (models.Llama(dim=512, hidden=1376), (torch.randint(0, 1000, (1, 128)),)),
    "unet": lambda: (models.UNet(), (torch.randn(1, 3, 128, 128),)),
    "lista": lambda: (models.LISTA(threshold=0.01), (torch.randn(64, 256),)),
}
HIDDEN = {
    "resnet18": ("conv1",),
    "resnet50": ("conv1", "conv2"),
    "mobilenet_v2": (".0.0",),
    "vit_tiny": ("mlp.0",),
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
        for path, module in model.named_modules():
            if (
                isinstance(module, (nn.Conv2d, nn.Linear))
                and any(h in path for h in HIDDEN.get(name, ()))
                and path != "conv1"
            ):
                prune.random_structured(module, "weight", amount, dim=0)
    return model.eval(), args


def measure(name: str, amount: float, inductor: bool, rounds: int) -> dict[str, Any]:
    model, args = prepare(name, amount)
    start = time.perf_counter()
    compiled = thresher.compile(model, args, target="cpu", validate="off")
    build = {"thresher": time.perf_counter() - start}
    contenders: dict[str, Callable] = {"thresher": compiled, "eager": model}
    with torch.no_grad():
        if inductor:
            torch._dynamo.reset()
            inductor_config.force_disable_caches = True  # a build is a build: what an earlier run left does not count
            start = time.perf_counter()
            contenders["torch.compile"] = torch.compile(model)
            contenders["torch.compile"](*args)
            build["torch.compile"] = time.perf_counter() - start
        leaves = torch.utils._pytree.tree_leaves
        error = compare(leaves(model(*args)), leaves(compiled(*args))).relative
        timings = interleaved({key: partial(f, *args) for key, f in contenders.items()}, rounds=rounds)
    report = compiled.report
    return {
        "model": name,
        "masked": amount,
        "parameters": [report.before.parameters, report.after.parameters],
        "flops": [report.before.flops, report.after.flops],
        "error": error,
        "build_seconds": {k: round(v, 2) for k, v in build.items()},
        "milliseconds": {k: [round(t.low, 3), round(t.median, 3), round(t.high, 3)] for k, t in timings.items()},
        "ratio": {k: round(t.median / timings["thresher"].median, 3) for k, t in timings.items() if k != "thresher"},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows so far: a run that is stopped keeps what it measured."""
    machine = {"llvm": cpu_name(), "threads": torch.get_num_threads()}
    versions = {p: version(p) for p in ("thresher", "torch", "apache-tvm")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(ZOO))
    parser.add_argument("--amounts", type=float, nargs="*", default=[0.0, 0.5])
    parser.add_argument(
        "--inductor",
        nargs="*",
        default=list(ZOO),
        help="the models that torch.compile runs, too (it builds for a minute)",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "zoo-cpu.json")
    options = parser.parse_args()
    rows = []
    for name in options.names:
        for amount in options.amounts:
            row = measure(name, amount, name in options.inductor, options.rounds)
            rows.append(row)
            write(options.output, rows)
            ratios = "  ".join(f"{k} {v:.2f}x" for k, v in row["ratio"].items())
            print(
                f"{name:14s} masked {amount:.0%}: {row['milliseconds']['thresher'][1]:8.2f} ms  {ratios}  error {row['error']:.1e}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
