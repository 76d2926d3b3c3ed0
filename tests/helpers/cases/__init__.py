"""One table of the cases of every registered pass, a module a stage; each goes through the whole proof kit."""

from __future__ import annotations

from helpers.cases import attention, canonicalize, fold, layers, sparsity, specialize, tokens
from thresher.testing import Entry

CASES: dict[str, list[Entry]] = {
    **canonicalize.CASES, **fold.CASES, **attention.CASES, **layers.CASES, **sparsity.CASES, **specialize.CASES, **tokens.CASES,
}  # fmt: skip
