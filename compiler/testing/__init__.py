"""The proof kit for passes: what a contributor's tests call, and what this library's own tests call.

prove(MyPass(), Case("conv, relu", build, channels=(4, 6), size=(5, 8)))   raises AssertionError with everything that is wrong
examine(...)                                                              the same as a list of findings
prove(MyPass(), zoo=True)                                                 on real models, too
mutate(MyPass(), Case(...))                                               changes of the source of the pass that no check notices
before_after(MyPass(), model, args)                                       the two graphs as text, their difference, the notes
refused(MyPass(), model, args, match="padding")                           the pass leaves the model alone, and says why
same_map(...), SameMap                                                    index maps are equal for all indices (z3)
replay(MyPass())                                                          which models of the zoo it changes
"""

from thresher.testing.cases import Case, Entry
from thresher.testing.index_maps import IndexMapError, prove_same_map
from thresher.testing.judge import Finding
from thresher.testing.mutation.mutants import Mutant, mutate
from thresher.testing.near_miss_graphs import near_misses
from thresher.testing.outcomes import Outcome, before_after, refused
from thresher.testing.proof import examine, prove
from thresher.testing.survey import Survey, Zoo
from thresher.testing.zoo import ZOO, Replayed, mask_channels, replay, settle, zero_channels

__all__ = [
    "ZOO", "Case", "Entry", "Finding", "IndexMapError", "Mutant", "Outcome", "Replayed", "Survey", "Zoo", "before_after", "examine",
    "mask_channels", "mutate", "near_misses", "prove", "prove_same_map", "refused", "replay", "settle", "zero_channels",
]  # fmt: skip
