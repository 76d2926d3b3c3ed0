"""The demo: a real pretrained image classifier, pruned with torch's own masks, folded, compiled, saved, and proven in a second process."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import prune

import thresher
from thresher.models.pretrained import efficientnet_lite0, imagenet_samples
from thresher.tuning.timing import Timing, interleaved


def prune_hidden(model: nn.Module, amount: float, images: Tensor) -> nn.Module:
    """A copy with ``amount`` of the hidden channels of every inverted residual block masked, filter and batch norm alike.

    The channels with the least effect go: root mean square of the activation times the norm of the weights that read it. What is left
    gets fresh batch-norm statistics. Both come from ``images``, whose labels are not used; nothing is trained.
    """
    pruned = copy.deepcopy(model)
    blocks = [b for b in pruned._blocks if hasattr(b, "_expand_conv")]
    activations: dict[nn.Module, Tensor] = {}
    hooks = [b._project_conv.register_forward_pre_hook(lambda m, x: activations.__setitem__(m, x[0])) for b in blocks]
    with torch.no_grad():
        pruned(images)
    for hook in hooks:
        hook.remove()
    for block in blocks:
        conv, norm, reader = block._expand_conv, block._bn0, block._project_conv
        effect = activations[reader].square().mean((0, 2, 3)).sqrt() * reader.weight.detach().flatten(1).norm(dim=0)
        prune.ln_structured(
            conv, "weight", amount, n=2, dim=0, importance_scores=effect.reshape(-1, 1, 1, 1).expand_as(conv.weight)
        )
        for name in ("weight", "bias"):
            prune.custom_from_mask(norm, name, conv.weight_mask[:, 0, 0, 0])
    return _recalibrated(pruned, images)


def _recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """New batch-norm statistics, from ``images``."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what is seen
        norm.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def run(amount: float, directory: Path) -> int:
    """Prints the table, writes ``model.thresher`` and ``report.html`` into ``directory``; returns the exit code."""
    console = Console(width=120)
    images, labels = imagenet_samples()
    dense = efficientnet_lite0()
    masked = prune_hidden(dense, amount, images)
    example = images[:1]
    console.print(
        f"EfficientNet-Lite0, ImageNet weights; {100 * amount:.0f} % of the hidden channels masked by torch.nn.utils.prune"
    )
    start = time.perf_counter()
    compiled = thresher.compile(masked, (example,), target="cpu", progress=True)
    built = time.perf_counter() - start
    with torch.no_grad():
        start = time.perf_counter()
        inductor = torch.compile(masked)
        inductor(example)
        inductor_built = time.perf_counter() - start
        contenders = {
            "eager, dense": dense,
            "eager, masked": masked,
            "torch.compile, masked": inductor,
            "Thresher": compiled,
        }
        timings = interleaved({name: partial(f, example) for name, f in contenders.items()})
        answers = {name: torch.cat([f(image[None]) for image in images]) for name, f in contenders.items()}
    compiled.report.latency = {name: t.median for name, t in timings.items()}
    _show(console, compiled, timings, answers, labels, {"torch.compile, masked": inductor_built, "Thresher": built})
    compiled.report.print(console)
    artifact, page = directory / "model.thresher", directory / "report.html"
    compiled.save(artifact)
    compiled.report.save_html(page)
    console.print(f"wrote {artifact} ({artifact.stat().st_size / 1e6:.1f} MB) and {page}")
    return _prove_elsewhere(console, artifact)


def _show(
    console: Console,
    compiled: thresher.Compiled,
    timings: dict[str, Timing],
    answers: dict[str, Tensor],
    labels: list[int],
    built: dict[str, float],
) -> None:
    report, truth = compiled.report, torch.tensor(labels)
    table = Table(title="one image, this CPU, interleaved medians", title_justify="left")
    for column in (
        "",
        "parameters",
        "GFLOP",
        "ms",
        "speed-up",
        "build, s",
        "error to masked",
        f"right of {len(labels)}",
        f"image 1 (truth: {labels[0]})",
    ):
        table.add_column(column, justify="left" if not column else "right")
    reference, base = answers["eager, masked"], timings["eager, masked"].median
    for name, timing in timings.items():
        figures = report.after if name == "Thresher" else report.before
        error = ((answers[name] - reference).abs().max() / reference.abs().max()).item()
        probability, guess = answers[name][0].softmax(0).max(0)
        table.add_row(
            name, f"{figures.parameters / 1e6:.2f} M", f"{figures.flops / 1e9:.3f}", f"{timing.median:.2f}", f"{base / timing.median:.2f}x",
            f"{built[name]:.1f}" if name in built else "", "pruned from this" if name == "eager, dense" else f"{error:.1e}",
            str(int((answers[name].argmax(1) == truth).sum())), f"{int(guess)} ({100 * probability.item():.0f} %)",
        )  # fmt: skip
    console.print(table)


def _prove_elsewhere(console: Console, artifact: Path) -> int:
    """Load the artifact in a process that never imports the model's code, and let it prove itself there."""
    script = (
        "import sys, thresher.cli.main; code = thresher.cli.main.main(['validate', sys.argv[1]]);"
        "assert 'efficientnet_lite_pytorch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(artifact)], capture_output=True, text=True)
    console.print("in a second process, without the model's code: " + (done.stdout or done.stderr).strip())
    return done.returncode
