"""A vision transformer trained here on real digits: what token reduction and attention replacement are measured on.

    python benchmarks/train_vit.py [--patch 2] [--epochs 12] [-o build/vit-digits.pt]

28 x 28 images in patches of 2: 196 tokens and the class token; 6 layers of 96 channels. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from thresher.models.pretrained import digits
from thresher.models.vit import ViT

TRAINED = 4000  # images; the others are the test


def split(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images and classes."""
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAINED], order[TRAINED:]
    return (images[train], classes[train]), (images[test], classes[test])


def vit(patch: int) -> ViT:
    """1 x 28 x 28 images -> 10 classes; ViT takes three channels, which are equal here."""
    return ViT(28, patch, dim=96, depth=6, heads=3, ratio=4, classes=10)


def grey(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def accuracy(model: torch.nn.Module, images: Tensor, classes: Tensor, batch: int = 50) -> float:
    """The fraction that is classified right."""
    with torch.no_grad():
        found = torch.cat([model(grey(part)).argmax(-1) for part in images.split(batch)])
    return float((found == classes).double().mean())


def train(patch: int, epochs: int, batch: int = 50, seed: int = 0) -> tuple[ViT, float]:
    """The model and its accuracy on the test images."""
    torch.manual_seed(seed)
    (images, classes), test = split()
    model = vit(patch)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps + 1, pct_start=0.2)
    for epoch in range(epochs):
        start = time.time()
        for part in torch.randperm(len(images)).split(batch):
            shifted = torch.roll(images[part], tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
            loss = F.cross_entropy(model(grey(shifted)), classes[part])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    return model.eval(), accuracy(model.eval(), *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/vit-digits.pt"))
    options = parser.parse_args()
    model, found = train(options.patch, options.epochs)
    print(f"test accuracy {found:.4f}")
    options.output.parent.mkdir(exist_ok=True)
    torch.save({"patch": options.patch, "accuracy": found, "state": model.state_dict()}, options.output)


if __name__ == "__main__":
    main()
