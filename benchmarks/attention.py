"""Attention over blocks, and models made cheaper within a budget.

    python benchmarks/attention.py kernel     # block-sparse attention against torch's dense one: 1024 to 4096 tokens, 0 to 90 % sparse
    python benchmarks/attention.py encoder    # MiniLM, 512 tokens, at most 1 % of the cosine of its embeddings
    python benchmarks/attention.py vit        # a vision transformer trained here (train_vit.py), fewer tokens
    python benchmarks/attention.py budgets    # more budget, more change; 100 seeds, and whether the budget held on fresh texts

Each writes its part of benchmarks/results/attention-<cpu>.json. Contenders take turns in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from thresher import Budget
from thresher.approximation.calibration import Calibration
from thresher.backends.tvm import TVMBackend
from thresher.backends.tvm.cpu import cpu_name
from thresher.frontend.capture import capture
from thresher.models.pretrained import minilm, news
from thresher.ops.sparse_attention import block_lists
from thresher.passes import pipelines
from thresher.rewriting.contract import Context
from thresher.rewriting.manager import PassManager
from thresher.tuning.timing import interleaved

HERE = Path(__file__).parent
HEADS, WIDTH, BLOCK = 8, 64, 64


class Sparse(nn.Module):
    def __init__(self, grid: Tensor):
        super().__init__()
        blocks, counts = block_lists(grid)
        self.register_buffer("blocks", blocks)
        self.register_buffer("counts", counts)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how = (BLOCK, BLOCK, WIDTH**-0.5)
        return torch.ops.thresher.sparse_attention(q, k, v, None, self.blocks, self.counts, *how)


def kernel() -> list[dict[str, Any]]:
    """In this process with both threads, and in one of its own with one."""
    if os.environ.get("TVM_NUM_THREADS") != "1":
        alone = os.environ | {"TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, __file__, "kernel"], env=alone, check=True, capture_output=True, text=True
        )
        return [*kernel_rows(torch.get_num_threads()), *json.loads(done.stdout.splitlines()[-1])]
    torch.set_num_threads(1)
    print(json.dumps(kernel_rows(1)))
    raise SystemExit


def kernel_rows(threads: int) -> list[dict[str, Any]]:
    rows = []
    for tokens in (1024, 2048, 4096):
        generator = torch.Generator().manual_seed(tokens)
        inputs = [torch.randn(1, HEADS, tokens, WIDTH, generator=generator) for _ in range(3)]
        calls: dict[str, Any] = {"torch": lambda inputs=inputs: F.scaled_dot_product_attention(*inputs)}
        density = {}
        for sparsity in (0.0, 0.5, 0.7, 0.85, 0.9):
            columns = tokens // BLOCK
            keep = max(1, round(columns * (1 - sparsity)))
            scores = torch.rand(1, HEADS, columns, columns, generator=generator)
            grid = scores >= scores.topk(keep, -1).values[..., -1:]
            program = PassManager(pipelines.specialize, "off").run(capture(Sparse(grid), inputs)).rounded()
            lowered = TVMBackend().lower(program, "cpu")
            allowed = grid.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
            wanted = F.scaled_dot_product_attention(*inputs, allowed)
            assert (lowered.run(inputs)[0] - wanted).abs().max() < 1e-5
            calls[f"{sparsity}"] = lambda lowered=lowered, inputs=inputs: lowered.run(inputs)
            density[f"{sparsity}"] = keep / columns
        times = interleaved(calls, rounds=15)
        for name, part in density.items():
            ratio = times["torch"].over(times[name])
            row = {
                "threads": threads,
                "tokens": tokens,
                "sparsity": round(1 - part, 3),
                "ms": round(times[name].median, 3),
            }
            rows.append(row | {"torch dense": round(ratio, 2), "of the ideal": round(ratio * part, 2)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def encoder() -> dict[str, Any]:
    """Compiled exact and approximate, against eager and torch.compile; the error on texts that neither chose nor judged."""
    model, texts = minilm(), news(512, 120)
    inputs, calibration, fresh = texts[0], texts[:64], texts[64:]
    start = time.perf_counter()
    found = thresher.compile(
        model, inputs, passes=["exact", "approximate"], calibration=calibration, budget=Budget(cosine=0.01)
    )
    seconds = time.perf_counter() - start
    exact = thresher.compile(model, inputs)
    graph = torch.compile(model)
    with torch.no_grad():
        times = interleaved(
            {
                "approximate": lambda: found(*inputs), "exact": lambda: exact(*inputs), "eager": lambda: model(*inputs),
                "torch.compile": lambda: graph(*inputs),
            },
            rounds=15,
        )  # fmt: skip
        errors = [float(1 - (found(*t) * model(*t)).sum()) for t in fresh]
    none = thresher.rewrite(
        model, inputs, passes=["exact", "approximate"], calibration=calibration, budget=Budget(cosine=0.0)
    )
    same = none.program.structurally_equal(thresher.rewrite(model, inputs).program)
    return {
        "ms": {name: round(t.median, 2) for name, t in times.items()},
        "ratio": {n: round(t.over(times["approximate"]), 2) for n, t in times.items() if n != "approximate"},
        "budget": 0.01,
        "error on fresh texts": round(sum(errors) / len(errors), 5),
        "worst text": round(max(errors), 5),
        "ledger": [{"pass": s.name, "error": round(s.after, 5), "changes": len(s.changes)} for s in found.report.spent],
        "seconds to build": round(seconds, 1),
        "budget 0 changes nothing": same,
    }


def vit() -> dict[str, Any]:
    from train_vit import accuracy, grey, split
    from train_vit import vit as make

    saved = torch.load(HERE.parent / "build" / "vit-digits.pt")
    model = make(saved["patch"])
    model.load_state_dict(saved["state"])
    model.eval()
    batch = 8
    (images, _), (test, classes) = split()
    samples = [(grey(part),) for part in images.split(batch)][:256]
    inputs = samples[0]
    start = time.perf_counter()
    found = thresher.compile(
        model, inputs, passes=["exact", "reduce-tokens"], calibration=samples, budget=Budget(top1=0.02)
    )
    seconds = time.perf_counter() - start
    exact = thresher.compile(model, inputs)
    with torch.no_grad():
        times = interleaved(
            {"approximate": lambda: found(*inputs), "exact": lambda: exact(*inputs), "eager": lambda: model(*inputs)},
            rounds=15,
        )
    rest = len(test) // batch * batch
    dense, small = (accuracy(m, test[:rest], classes[:rest], batch) for m in (model, found))
    return {
        "images per second": {n: round(1e3 * batch / t.median) for n, t in times.items()},
        "ratio": {n: round(t.over(times["approximate"]), 2) for n, t in times.items() if n != "approximate"},
        "accuracy": {"before": dense, "after": small, "images": rest},
        "tokens": [f"{c.module}: {c.choice}" for c in found.report.spent[0].changes] if found.report.spent else [],
        "seconds to build": round(seconds, 1),
    }


def budgets() -> dict[str, Any]:
    """MiniLM at 64 tokens, 100 times 24 other texts that choose and judge; 40 fresh texts say whether the budget held."""
    model, texts = minilm(), news(64, 640)
    program = PassManager(pipelines.exact).run(capture(model, texts[0]))
    fresh = [list(t) for t in texts[-40:]]
    amounts, held, rows = {}, 0, []

    def run(limit: float, seed: int) -> tuple[int, float, float]:
        first = seed * 5 % 570
        calibration = Calibration.of(program, texts[first : first + 24], Budget(cosine=limit, seed=seed))
        manager = PassManager(["sparse-attention{selected=false,block=16}"])
        result = manager.run(program, Context(calibration=calibration))
        errors = [calibration.error(result, flat) for flat in fresh]
        return len(manager.records[0].rewrites), sum(errors) / len(errors), max(errors)

    for limit in (0.01, 0.001, 0.0):
        amounts[str(limit)] = run(limit, 0)[0]
    for seed in range(100):
        changed, mean, worst = run(0.01, seed)
        held += mean <= 0.01
        rows.append([changed, round(mean, 5), round(worst, 5)])
        print(seed, rows[-1], held, file=sys.stderr, flush=True)
    return {
        "changes by budget": amounts,
        "seeds": 100,
        "held on fresh texts": held,
        "changes, mean and worst error": rows,
    }


def main() -> None:
    part = sys.argv[1]
    found = {"kernel": kernel, "encoder": encoder, "vit": vit, "budgets": budgets}[part]()
    path = HERE / "results" / f"attention-{cpu_name()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: version(name) for name in ("torch", "apache-tvm")}
    path.write_text(json.dumps({**known, "versions": versions, part: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
