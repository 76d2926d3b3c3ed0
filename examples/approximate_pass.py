"""An approximate pass: linear layers of low rank, within a measured budget.

    python examples/approximate_pass.py

    x W^T  ->  (x B^T) A^T        W ~ A B, of the rank that the budget allows

The inputs decide what of W matters: with the Gram matrix G = X^T X of calibration inputs, the best A B for |X W^T - X (A B)^T| is the
truncated SVD of W G^(1/2) (Yuan et al., ASVD, 2023; Wang et al., SVD-LLM, 2024).

``ApproximatePass`` does what all approximate passes share: it measures how much an error at each place costs at the output, orders the
candidates by what they save for it, takes as many as the budget allows, and measures the result on held-out samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from thresher import Budget
from thresher.analysis.cost.cost import seconds_of
from thresher.authoring import (
    ApproximatePass,
    Candidate,
    Context,
    Note,
    Program,
    argument,
    dtype_of,
    module_path,
    register_pass,
    watch,
)

aten = torch.ops.aten
RANK_FRACTIONS = (0.5, 0.25, 0.125)


@register_pass
@dataclass(frozen=True)
class LowRank(ApproximatePass):
    """Replace weights by products of two narrow ones, within the budget."""

    name: ClassVar[str] = "low-rank"
    target_ops: ClassVar[tuple] = (aten.linear.default,)
    min_width: int = 32  # narrower layers stay

    def candidates(self, program: Program, context: Context) -> tuple[list[Candidate], list[Note]]:
        """Return several ranks for every layer: the squared relative error that each makes there, and the seconds that it saves."""
        assert context.calibration is not None
        layers = [n for n in program.calls(aten.linear.default) if program.constant(n.args[1]) is not None]
        wide = [n for n in layers if min(program.constants[n.args[1].target].shape) >= self.min_width]
        grams = _grams(program, wide, context.calibration.search_samples)
        candidates, refusals = [], [Note.at(n, f"narrower than {self.min_width}") for n in layers if n not in wide]
        for node in wide:
            weight = program.constants[node.args[1].target].double()
            (outputs, inputs), root = weight.shape, _root(grams[node])
            values = torch.linalg.svdvals(weight @ root).square()
            for fraction in RANK_FRACTIONS:
                rank = int(fraction * min(outputs, inputs))
                error = float(values[rank:].sum() / values.sum())
                saved = seconds_of(node, context.machine) * (1 - rank * (outputs + inputs) / (outputs * inputs))
                choice = f"rank {rank} of {min(outputs, inputs)}"
                candidates.append(
                    Candidate(node.name, node.name, choice, error, saved, node.name, module_path(node), (rank, root))
                )
        return [c for c in candidates if c.saved > 0], refusals

    def build(self, program: Program, chosen: Sequence[Candidate]) -> Program:
        work = program.clone()
        by_name = {c.node: c.payload for c in chosen}
        for node in [n for n in work.calls(aten.linear.default) if n.name in by_name]:
            rank, root = by_name[node.name]
            weight = node.args[1]
            a, b = _factors(work.constants[weight.target].double(), root, rank)
            narrow, wide = (work.add_constant(v, weight.target, dtype_of(weight), like=node) for v in (b, a))
            inner = work.insert_call(node, aten.linear.default, (node.args[0], narrow), like=node)
            args = (inner, wide, argument(node, 2, "bias"))
            node.replace_all_uses_with(work.insert_call(node, aten.linear.default, args, like=node))
        return work.clean()


def _grams(program: Program, layers: Sequence[fx.Node], samples: Sequence[list[Any]]) -> dict[fx.Node, Tensor]:
    """Return X^T X of the inputs of each layer, over the samples, in float64."""
    grams: dict[fx.Node, Tensor] = {}

    def add(node: fx.Node, values: dict[fx.Node, Any]) -> None:
        x = values[node.args[0]].flatten(0, -2).double()
        grams[node] = grams.get(node, 0) + x.mT @ x

    watch(program, samples, {node: partial(add, node) for node in layers})
    return grams


def _root(gram: Tensor) -> Tensor:
    """Return G^(1/2), of full rank: directions that no sample has count a little, too."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=1e-6 * float(values[-1])).sqrt()) @ vectors.mT


def _factors(weight: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A [N, rank] and B [rank, K]."""
    u, s, v = torch.linalg.svd(weight @ root, full_matrices=False)
    return u[:, :rank] * s[:rank], torch.linalg.solve(root, v[:rank].mT).mT


def model(width: int = 64) -> nn.Module:
    """Return layers whose weights are of low rank but for some noise, as trained ones often are."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.LayerNorm(width))
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            n, k = layer.weight.shape
            layer.weight.copy_(torch.randn(n, 8) @ torch.randn(8, k) / k**0.5 + 0.01 * torch.randn(n, k) / k**0.5)
    return layers.eval()


def main() -> None:
    from thresher.approximation.calibration import Calibration
    from thresher.testing import Case, before_after, prove

    def context(program: Program, limit: float = 0.02) -> Context:
        generator = torch.Generator().manual_seed(1)
        example = program.probe[0]
        samples = [torch.randn(example.shape, generator=generator).to(example.dtype) for _ in range(16)]
        return Context(calibration=Calibration.of(program, samples, Budget(rel_l2=limit)))

    case = Case("two layers", lambda batch: (model(), (torch.randn(batch, 64),)), batch=(2, 8))
    prove(LowRank(), case, context=context)
    program = case.program({"batch": 8})
    found = before_after(LowRank(), program, context=context(program))
    print(found)
    ranks = [min(found.after.constants[n.args[1].target].shape) for n in found.after.calls(aten.linear.default)]
    assert max(ranks) <= 32, ranks
    nothing = before_after(LowRank(), program, context=context(program, 0.0))
    assert not nothing.changed, "a budget of 0 changes nothing"
    print("proven")


if __name__ == "__main__":
    main()
