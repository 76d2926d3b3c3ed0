"""The effect of a token reduction on every position of the input: a mean over samples hides that tokens of some positions always go.

(FEATHER, Endo et al., 2024, found criteria that keep little but the bottom of an image.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

import thresher.ops  # noqa: F401  (registers the operators)
from thresher.approximation.calibration import Calibration, watch
from thresher.ir.program import Program

MATCH = torch.ops.thresher.match_tokens.default
Samples = Sequence[list[Any]]


def kept_by_position(program: Program, samples: Samples) -> Tensor:
    """Return, for each token [N] of the first reduction, the fraction of samples where it has a slot of its own after the last one."""
    matches = _chain(list(program.calls(MATCH)))
    kept = torch.zeros(matches[0].meta["val"][2].shape[1])
    alive, slot = torch.empty(0), torch.empty(0)

    def follow(step: int, values: dict[fx.Node, Any]) -> None:
        nonlocal alive, slot
        assign, _, owners = values[matches[step]]
        if step:
            owners = owners.gather(1, slot.clamp(min=0)) * alive
            assign = assign.gather(1, slot.clamp(min=0))
        alive, slot = owners.float(), assign
        if step == len(matches) - 1:
            kept.add_(alive.mean(0) / len(samples))

    watch(program, samples, {m: partial(follow, i) for i, m in enumerate(matches)})
    return kept


def _chain(matches: list[fx.Node]) -> list[fx.Node]:
    """Return the reductions that follow one another, from the first on."""
    chain = matches[:1]
    for match in matches[1:]:
        if match.meta["val"][2].shape == chain[-1].meta["val"][1].shape:
            chain.append(match)
    return chain


def error_by_position(program: Program, calibration: Calibration, samples: Samples, tokens: int) -> Tensor | None:
    """Return the relative L2 error [N] of the first output at each token, if its second dimension is the tokens, else None."""
    reference = calibration.reference(samples[0])
    if (
        not reference
        or not isinstance(reference[0], Tensor)
        or reference[0].dim() < 3
        or reference[0].shape[1] != tokens
    ):
        return None
    errors, norms = torch.zeros(tokens), torch.zeros(tokens)
    for flat in samples:
        expected, result = calibration.reference(flat)[0].float(), program.run(*flat)[0].float()
        errors += (result - expected).square().transpose(0, 1).flatten(1).sum(1)
        norms += expected.square().transpose(0, 1).flatten(1).sum(1)
    return (errors / norms.clamp(min=1e-30)).sqrt()


def describe_positions(program: Program, calibration: Calibration) -> list[str]:
    """Return sentences on both, on the held-out samples; none where nothing was reduced."""
    samples = calibration.held_out_samples
    if not any(program.calls(MATCH)):
        return []
    kept = kept_by_position(program, samples)
    least = int(kept.argmin())
    sentences = [
        f"of {len(kept)} tokens {100 * kept.mean():.0f} % are left, by their position from {100 * kept[least]:.0f} % (token {least}) "
        f"to {100 * kept.max():.0f} %"
    ]
    errors = error_by_position(program, calibration, samples, len(kept))
    if errors is not None:
        worst = int(errors.argmax())
        sentences.append(f"error by position: {errors.median():.1e}, at worst {errors[worst]:.1e} (token {worst})")
    return sentences
