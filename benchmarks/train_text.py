"""Models of text that are trained here on real news: what skipping zeros is measured on.

    python benchmarks/train_text.py [--steps 1500] [-o build/text.pt]

Two of them, with ReLU and gated by SiLU; three minutes each on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.models.pretrained import news_text
from thresher.models.text import CharacterModel, numbered

CONTEXT, BATCH = 16, 256


def windows(held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """[N, context + 1] of the first part of the text, and of the rest, which is not trained on."""
    text = numbered(news_text())
    cut = int(len(text) * (1 - held_out))
    return text[:cut].unfold(0, CONTEXT + 1, 1), text[cut:].unfold(0, CONTEXT + 1, 1)


def loss_of(model: torch.nn.Module, rows: Tensor) -> float:
    """Nats per character."""
    with torch.no_grad():
        return float(sum(F.cross_entropy(model(r[:, :-1]), r[:, -1]) * len(r) for r in rows.split(1024)) / len(rows))


def train(gated: bool, steps: int, seed: int = 0) -> tuple[CharacterModel, float]:
    """The model and its loss on text that it has not seen."""
    torch.manual_seed(seed)
    trained, fresh = windows()
    model = CharacterModel(context=CONTEXT, gated=gated)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps + 1, pct_start=0.1)
    start = time.time()
    for step in range(steps):
        rows = trained[torch.randint(0, len(trained), (BATCH,))]
        loss = F.cross_entropy(model(rows[:, :-1]), rows[:, -1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {loss.item():.3f} nats, {time.time() - start:.0f} s", flush=True)
    return model.eval(), loss_of(model, fresh[:8192])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/text.pt"))
    options = parser.parse_args()
    saved = {}
    for name, gated in (("relu", False), ("gated", True)):
        model, loss = train(gated, options.steps)
        print(f"{name}: {loss:.3f} nats per character of unseen text")
        saved[name] = {"gated": gated, "state": model.state_dict(), "loss": loss}
    options.output.parent.mkdir(exist_ok=True)
    torch.save(saved, options.output)


if __name__ == "__main__":
    main()
