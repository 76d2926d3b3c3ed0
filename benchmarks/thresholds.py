"""Zeros that thresholds and pruning make, skipped.

    python benchmarks/thresholds.py decode    # one row times a weight that comes from memory, 0 to 97 % of the row 0, against torch's dense
    python benchmarks/thresholds.py lista     # LISTA, 16 iterations, 256 -> 1024, batch 1 and 64, against torch.compile
    python benchmarks/thresholds.py text      # models of text trained here (train_text.py): exact skipping, and CATS under a budget
    python benchmarks/thresholds.py weights   # pruned weights: blocks, 2:4, scattered

Each writes its part of benchmarks/results/thresholds-<cpu>.json. Contenders take turns in one process; ratios are medians over rounds.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
import thresher.ops
from thresher import Budget
from thresher.backends.tvm import TVMBackend
from thresher.backends.tvm.cpu import cpu_name
from thresher.frontend.capture import capture
from thresher.models.lista import LISTA
from thresher.tuning.timing import Timing, interleaved

HERE = Path(__file__).parent
BEYOND = 192 << 20  # bytes of weights that are read in turn: more than any cache holds
ops = torch.ops.thresher


class Turns(nn.Module):
    """One input, and so many weights that each comes from memory."""

    def __init__(self, weights: list[Tensor], sparse: bool):
        super().__init__()
        self.weights, self.sparse = nn.ParameterList(weights), sparse

    def forward(self, x: Tensor) -> list[Tensor]:
        return [ops.sparse_linear(x, w) if self.sparse else F.linear(x, w) for w in self.weights]


def decode() -> list[dict[str, Any]]:
    """Beyond 80 % more weights: what is read of them must not fit the cache either (at 97 % it does, 20 MB)."""
    shapes = ((4096, 1024), (1024, 4096))
    return [
        r
        for s in shapes
        for count, zeros in ((12, (0.0, 0.5, 0.7)), (40, (0.9, 0.97)))
        for r in decoded(*s, count, zeros)
    ]


def decoded(inputs: int, outputs: int, count: int, parts: tuple[float, ...]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(outputs, inputs, generator=generator) for _ in range(count)]
    x = torch.randn(1, inputs, generator=generator)
    lowered = TVMBackend().lower(capture(Turns(weights, True), (x,)).rounded(), "cpu")
    dense = Turns(weights, False)
    rows = []
    for zeros in parts:
        given = x * (torch.rand(inputs, generator=generator) >= zeros)
        for found, wanted in zip(lowered.run([given]), dense(given)):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        with torch.no_grad():
            times = interleaved({"ours": partial(lowered.run, [given]), "torch": partial(dense, given)}, rounds=15)
        row = {"weight": f"{inputs} -> {outputs}", "zeros": zeros}
        row |= {f"{n}, microseconds": round(1e3 * t.median / count) for n, t in times.items()}
        rows.append(row | {"ratio": round(times["torch"].over(times["ours"]), 2)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def trained_lista(steps: int = 300) -> LISTA:
    """On sparse codes of a random dictionary: 3 % of 1024."""
    torch.manual_seed(0)
    model = LISTA()
    dictionary = F.normalize(torch.randn(256, 1024), dim=0)
    with torch.no_grad():
        step = 1.0 / torch.linalg.matrix_norm(dictionary, 2).item() ** 2
        model.w.weight.copy_(step * dictionary.T)
        model.s.weight.copy_(torch.eye(1024) - step * dictionary.T @ dictionary)
    model.register_buffer("dictionary", dictionary)
    optimiser = torch.optim.Adam(model.parameters(), 3e-4)
    for _ in range(steps):
        codes = sparse_codes(64)
        loss = (model(codes @ dictionary.T) - codes).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def sparse_codes(count: int) -> Tensor:
    return torch.randn(count, 1024) * (torch.rand(count, 1024) < 0.03)


def lista() -> list[dict[str, Any]]:
    trained = trained_lista()
    torch.manual_seed(0)
    fresh = LISTA().eval()
    fresh.register_buffer("dictionary", trained.dictionary)
    return [coded(n, m, batch) for n, m in (("trained", trained), ("as initialised", fresh)) for batch in (1, 64)]


def coded(name: str, model: LISTA, batch: int) -> dict[str, Any]:
    x = sparse_codes(batch) @ model.dictionary.T
    compiled, graph = thresher.compile(model, (x,)), torch.compile(model)
    with torch.no_grad():
        calls = {"ours": partial(compiled, x), "torch.compile": partial(graph, x), "eager": partial(model, x)}
        times = interleaved(calls, rounds=15)
        assert (compiled(x) - model(x)).abs().max() <= 1e-4 * model(x).abs().max()
    zeros = [line for line in compiled.report.sparsity if line.chosen]
    row = {"model": name, "batch": batch, "layers that skip": len(zeros), **compared(times)}
    work = 2 * batch * 1024 * (256 + 15 * 1024)
    row["GFLOP/s if all were multiplied"] = {n: round(work / t.median / 1e6) for n, t in times.items()}
    if zeros:
        row["not 0 in the last layer"] = round(zeros[-1].nonzero, 3)
    print(row, file=sys.stderr, flush=True)
    return row


def compared(times: dict[str, Timing]) -> dict[str, Any]:
    first = next(iter(times))
    return {
        "ms": {n: round(t.median, 4) for n, t in times.items()},
        "ratio": {n: round(t.over(times[first]), 2) for n, t in times.items() if n != first},
    }


def text() -> dict[str, Any]:
    from train_text import loss_of, windows

    from thresher.models.text import CharacterModel

    saved, (trained, fresh) = torch.load(HERE.parent / "build" / "text.pt"), windows()
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: Tensor, count: int) -> list[Tensor]:
        return [rows[i : i + 1, :-1] for i in torch.randint(0, len(rows), (count,), generator=generator)]

    def model_of(name: str) -> CharacterModel:
        model = CharacterModel(gated=saved[name]["gated"])
        model.load_state_dict(saved[name]["state"])
        return model.eval()

    found: dict[str, Any] = {}
    model, x = model_of("relu"), drawn(fresh, 1)[0]
    skipping = thresher.compile(model, (x,))
    dense = TVMBackend().lower(
        thresher.rewrite(model, (x,)).program.rounded(), "cpu"
    )  # the same kernels, and nothing skipped
    graph = torch.compile(model)
    with torch.no_grad():
        times = interleaved(
            {
                "skipping": lambda: skipping(x), "dense": lambda: dense.run([x]), "torch.compile": lambda: graph(x),
                "eager": lambda: model(x),
            },
            rounds=20,
        )  # fmt: skip
        errors = [float((skipping(t) - model(t)).abs().max() / model(t).abs().max()) for t in drawn(fresh, 200)]
    found["relu"] = {
        "nats per character": round(saved["relu"]["loss"], 3), **compared(times), "largest error on 200 texts": max(errors),
        "zeros": [{k: v if isinstance(v, str) else round(v, 4) for k, v in asdict(line).items()} for line in skipping.report.sparsity],
    }  # fmt: skip
    print(json.dumps(found["relu"]), file=sys.stderr, flush=True)

    model = model_of("gated")
    limit = 0.05
    half = thresher.compile(
        model, (x,), passes=["exact", "threshold-activations{density=0.5,kinds=number,where=gate}"],
        calibration=drawn(trained, 256), budget=Budget(kl=limit),
    )  # fmt: skip
    free = thresher.compile(
        model, (x,), passes=["exact", "threshold-activations"], calibration=drawn(trained, 256), budget=Budget(kl=limit)
    )
    exact, graph = thresher.compile(model, (x,)), torch.compile(model)
    with torch.no_grad():
        times = interleaved(
            {
                "half of each gate": lambda: half(x), "as the budget allows": lambda: free(x), "exact": lambda: exact(x),
                "torch.compile": lambda: graph(x), "eager": lambda: model(x),
            },
            rounds=20,
        )  # fmt: skip
        texts = drawn(fresh, 512)
        spent = {}
        for name, compiled in (("half of each gate", half), ("as the budget allows", free)):
            pairs = [(model(t).log_softmax(-1), compiled(t).log_softmax(-1)) for t in texts]
            spent[name] = round(float(sum((a.exp() * (a - b)).sum() for a, b in pairs) / len(texts)), 5)
        rows = fresh[:512]
        whole = loss_of(model, rows)
        losses = {
            name: round(float(-sum(c(r[None, :-1]).log_softmax(-1)[0, r[-1]] for r in rows) / len(rows)), 4)
            for name, c in (("half of each gate", half), ("as the budget allows", free))
        }
    found["gated"] = {
        "nats per character": round(whole, 4), "budget, nats of KL": limit, "spent on 512 fresh texts": spent,
        "nats per character after": losses, **compared(times),
        "changes": {n: [f"{c.module}: {c.choice}" for s in m.report.spent for c in s.changes] for n, m in (("half", half), ("free", free))},
    }  # fmt: skip
    return found


def pruned(kind: str, outputs: int, inputs: int, left: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    if kind == "2:4":
        groups = weight.reshape(outputs, -1, 4)
        return (groups * (groups.abs() >= groups.abs().topk(2, -1).values[..., -1:])).reshape(outputs, inputs)
    high, wide = {"scattered": (1, 1), "16 x 1": (16, 1), "1 x 16": (1, 16), "32 x 32": (32, 32)}[kind]
    mask = torch.rand(outputs // high, inputs // wide, generator=generator) < left
    return weight * mask.repeat_interleave(high, 0).repeat_interleave(wide, 1)


class Layers(nn.Module):
    def __init__(self, weight: Tensor, count: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(weight.shape[1], len(weight), bias=False) for _ in range(count))
        with torch.no_grad():
            for i, layer in enumerate(self.layers):  # each its own values, or they would be one layer
                layer.weight.copy_(weight * (1 + i / 64))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def weights() -> list[dict[str, Any]]:
    """What is shipped: the layout (or dense) that the build measured to be fastest."""
    kinds = (("16 x 1", 0.1), ("1 x 16", 0.1), ("32 x 32", 0.1), ("scattered", 0.1), ("scattered", 0.3), ("2:4", 0.5))
    return [shipped(kind, left, batch) for batch in (1, 64) for kind, left in kinds]


def shipped(kind: str, left: float, batch: int, inputs: int = 1024, outputs: int = 4096) -> dict[str, Any]:
    count = BEYOND // (4 * inputs * outputs) if batch == 1 else 1
    model, x = Layers(pruned(kind, outputs, inputs, left), count).eval(), torch.randn(batch, inputs)
    compiled = thresher.compile(model, (x,))
    dense = TVMBackend().lower(thresher.rewrite(model, (x,)).program.rounded(), "cpu")
    with torch.no_grad():
        calls = {"ours": partial(compiled, x), "ours, dense": partial(dense.run, [x]), "torch": partial(model, x)}
        times = interleaved(calls, rounds=12)
        for a, b in zip(compiled(x), model(x)):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    line = compiled.report.sparsity[0]
    kept = "compressed" if line.chosen else "dense"
    row = {"batch": batch, "zeros": kind, "left": left, "seen": line.kind, "kept": kept}
    row["microseconds"] = {n: round(1e3 * t.median / count) for n, t in times.items()}
    row["ratio"] = {n: round(t.over(times["ours"]), 2) for n, t in times.items() if n != "ours"}
    print(row, file=sys.stderr, flush=True)
    return row


def main() -> None:
    part = sys.argv[1]
    found = {"decode": decode, "lista": lista, "text": text, "weights": weights}[part]()
    path = HERE / "results" / f"thresholds-{cpu_name()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: version(name) for name in ("torch", "apache-tvm")}
    path.write_text(json.dumps({**known, "versions": versions, part: found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
