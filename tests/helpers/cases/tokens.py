"""Cases of the passes that pass fewer tokens on."""

from __future__ import annotations

from torch import nn

from helpers.attention import Layers, sequences
from helpers.cases.contexts import calibrated
from thresher.testing import Case, Entry


def layers(tokens: int) -> tuple[nn.Module, tuple]:
    return Layers(2), (sequences(1, tokens, 4)[0],)


CASES = {
    "reduce-tokens": [
        Entry(Case("layers", layers, tokens=(32,)), first=("simplify",), context=calibrated(0.5, noise=0.2)),
    ],
}
