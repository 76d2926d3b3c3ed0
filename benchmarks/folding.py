"""What folding costs and what it gives back.

    python benchmarks/folding.py speed      # seconds and memory on one core: ViT-B/16, Swin-T, ResNet-152, a decoder
    python benchmarks/folding.py gain       # ResNet-50 with 5 % and 50 % of the inner channels pruned, against the dense one, interleaved

Writes benchmarks/results/folding-*.json with the machine and the versions. *Efficiency* is time saved over FLOPs saved.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))


def torchvision(name: str) -> tuple[nn.Module, tuple]:
    from helpers.architectures import build, settle
    from thresher.testing import zero_channels

    model, args = build("torchvision", name)
    return zero_channels(settle(model, args), 0.3), (torch.randn(1, 3, 224, 224),)


def decoder() -> tuple[nn.Module, tuple]:
    """1.05 B parameters; 30 % of the rows of every projection are zero."""
    from thresher import models
    from thresher.testing import zero_channels

    model = models.Llama(32000, 2048, 22, 32, 8, 5632).eval()
    return zero_channels(model, 0.3), (torch.randint(0, 100, (1, 16)),)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple]]] = {
    "vit_b_16": partial(torchvision, "vit_b_16"),
    "swin_t": partial(torchvision, "swin_t"),
    "resnet152": partial(torchvision, "resnet152"),
    "decoder_1b": decoder,
}


def speed() -> list[dict[str, Any]]:
    from thresher.frontend.capture import capture
    from thresher.passes import pipelines
    from thresher.rewriting.manager import PassManager

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    PassManager(pipelines.exact, "off").run(
        capture(small, (torch.randn(1, 3, 8, 8),))
    )  # what is loaded once is loaded now
    for name, make in MODELS.items():
        model, args = make()
        program = capture(model, args)
        weights = sum(t.numel() * t.element_size() for t in program.constants.values())
        resource_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        manager = PassManager(pipelines.exact, "off")
        start = time.perf_counter()
        folded = manager.run(program)
        row = {
            "model": name,
            "parameters": [program.original.parameter_count, folded.parameter_count()],
            "seconds": {r.name: round(r.seconds, 2) for r in manager.records},
            "all_seconds": round(time.perf_counter() - start, 2),
            "more_memory_per_weight_byte": round(
                (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resource_before) / weights, 2
            ),
        }
        print(row, flush=True)
        rows.append(row)
        del model, program, folded, manager
    return rows


def gain() -> list[dict[str, Any]]:
    import thresher
    from thresher.tuning.timing import interleaved

    x = (torch.randn(1, 3, 224, 224),)
    built = {f"{amount:.0%}": thresher.compile(pruned(amount, x), x, target="cpu") for amount in (0.0, 0.05, 0.5)}
    timings = interleaved({name: partial(c, *x) for name, c in built.items()}, rounds=30)
    dense = timings["0%"].median
    rows = []
    for name, timing in timings.items():
        flops = 1 - built[name].report.after.flops / built["0%"].report.after.flops
        saved = 1 - timing.median / dense
        rows.append(
            {
                "pruned": name,
                "milliseconds": [round(v, 2) for v in (timing.low, timing.median, timing.high)],
                "flops_saved": round(flops, 3),
                "time_saved": round(saved, 3),
                "efficiency": round(saved / flops, 2) if flops > 0.02 else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


def pruned(amount: float, x: tuple) -> nn.Module:
    """ResNet-50 with ``amount`` of the channels inside every block dead, with their batch norms."""
    from helpers.architectures import build, settle

    model, _ = build("torchvision", "resnet50")
    settle(model, x)
    generator = torch.Generator().manual_seed(1)
    for block in (b for b in model.modules() if hasattr(b, "conv3")):
        for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
            dead = torch.randperm(conv.out_channels, generator=generator)[: int(amount * conv.out_channels)]
            with torch.no_grad():
                for tensor in (conv.weight, norm.weight, norm.bias):
                    tensor[dead] = 0
    return model


def main() -> int:
    parts = {"speed": speed, "gain": gain}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="speed", choices=parts)
    part = parser.parse_args().part
    rows = parts[part]()
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {p: version(p) for p in ("thresher", "torch", "apache-tvm")}
    path = HERE / "results" / f"folding-{part}.json"
    path.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
