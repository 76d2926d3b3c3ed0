"""A model for a batch of any size, lowered for a few sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thresher.backends.base import Executable, KernelTime
from thresher.runtime.batching import BatchSplitter
from thresher.runtime.weight_store import Weights


class BatchedExecutable(Executable):
    """Code for a few sizes of batches, together for any size.

    ``parts`` is the code by the size of the batch; ``batched`` and ``times`` are as for :class:`BatchSplitter`.
    """

    def __init__(self, parts: Mapping[int, Executable], batched: Sequence[bool], times: Mapping[int, float]):
        self.parts = dict(parts)
        self.splitter = BatchSplitter({size: part.run for size, part in parts.items()}, batched, times)
        largest = parts[max(parts)]
        self.memory = dict(largest.memory) | {"weights": sum(p.memory.get("weights", 0) for p in parts.values())}
        self.tuned = (sum(p.tuned[0] for p in parts.values()), sum(p.tuned[1] for p in parts.values()))
        self.library = list(dict.fromkeys(call for p in parts.values() for call in p.library))
        self.rounds_more = any(p.rounds_more for p in parts.values())

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        return self.splitter(inputs)

    def as_text(self) -> str:
        return "\n".join(f"batch of {size}:\n{part.as_text()}" for size, part in self.parts.items())

    def constants(self) -> Weights | None:
        return self.parts[max(self.parts)].constants()

    def profile(self, inputs: Sequence[Any]) -> list[KernelTime]:
        """Profile the code for the largest size that the inputs fill; return nothing where they fill none."""
        count = self.splitter.count(inputs)
        size = max((s for s in self.parts if s <= count), default=min(self.parts))
        samples = [x[:size] if batched else x for x, batched in zip(inputs, self.splitter.batched)]
        return self.parts[size].profile(samples) if count >= size else []

    def save(self, directory: Path, weights: Weights) -> dict[str, Any]:
        sizes = {}
        for size, part in self.parts.items():
            (directory / str(size)).mkdir()
            sizes[str(size)] = part.save(directory / str(size), weights)
        return {
            "sizes": sizes,
            "batched": self.splitter.batched,
            "times": {str(size): self.splitter.times[size] for size in self.parts},
        }
