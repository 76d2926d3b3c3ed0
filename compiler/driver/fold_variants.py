"""Variants of a pipeline that fold to other widths. How narrow a fold should leave a model depends on the machine: a width that ends in the
middle of a tile can cost more than a larger one. The rule of ``fold-channels`` takes the answer from a table; measuring the variants gives
it for this model on this target.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from thresher.errors import PassError
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.passes.fold.permute_channels import PermuteChannels
from thresher.rewriting.contract import Pass
from thresher.rewriting.registry import make_pass


def variants(passes: Sequence[str | Pass]) -> dict[str, list[Pass]]:
    """Return the pipeline with other widths: as given, cut to the last channel, padded up to whole tiles, and not folded at all.

    Raises :class:`PassError` where the pipeline folds nothing.
    """
    chain = [make_pass(p) for p in passes]
    if not any(isinstance(p, FoldChannels) for p in chain):
        raise PassError("widths='measured' needs the pass fold-channels in the pipeline")

    def folding(**options: Any) -> list[Pass]:
        return [dataclasses.replace(p, **options) if isinstance(p, FoldChannels) else p for p in chain]

    return {
        "folded": chain,
        "to the last channel": folding(round_to=1),
        "to whole tiles": folding(slack=1.0),
        "not folded": [p for p in chain if not isinstance(p, (FoldChannels, PermuteChannels))],
    }
