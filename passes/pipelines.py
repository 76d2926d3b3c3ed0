"""The built-in pipelines, readable as a table of contents."""

from collections.abc import Sequence

from thresher.passes.attention.pool_keys import PoolKeys
from thresher.passes.attention.pool_values import PoolValues
from thresher.passes.attention.pyramid_attention import PyramidAttention
from thresher.passes.attention.share_attention import ShareAttention
from thresher.passes.attention.skip_masked_blocks import SkipMaskedBlocks
from thresher.passes.attention.skip_small_weights import SkipSmallWeights
from thresher.passes.attention.sparse_attention import SparseAttention
from thresher.passes.canonicalize.canonicalize_attention import CanonicalizeAttention
from thresher.passes.canonicalize.canonicalize_threshold import CanonicalizeThreshold
from thresher.passes.canonicalize.complex_numbers import ComplexNumbers
from thresher.passes.canonicalize.evaluate_constants import EvaluateConstants
from thresher.passes.canonicalize.share_key_heads import ShareKeyHeads
from thresher.passes.canonicalize.simplify import Simplify
from thresher.passes.fold.fold_batch_norm import FoldBatchNorm
from thresher.passes.fold.fold_channels import FoldChannels
from thresher.passes.fold.fold_scale import FoldScale
from thresher.passes.fold.fold_vocabulary import FoldVocabulary
from thresher.passes.fold.merge_duplicates import MergeDuplicates
from thresher.passes.fold.permute_channels import PermuteChannels
from thresher.passes.layers.drop_sublayers import DropSublayers
from thresher.passes.sparsity.select_neurons import SelectNeurons
from thresher.passes.sparsity.skip_pruned_weights import SkipPrunedWeights
from thresher.passes.sparsity.skip_zeros import SkipZeros
from thresher.passes.sparsity.threshold_activations import ThresholdActivations
from thresher.passes.specialize.channels_last import ChannelsLast
from thresher.passes.tokens.reduce_tokens import ReduceTokens
from thresher.rewriting.contract import Pass

#: A pipeline by name, a pass as text, or a list of both and of instances.
Passes = str | Sequence[str | Pass]

#: One spelling for each thing.
canonicalize = (
    EvaluateConstants(),  # masks, parametrizations, position grids
    ComplexNumbers(),  # pairs of real numbers; Fourier transforms are products
    Simplify(),  # no-ops, split -> slice, x @ W -> linear
    CanonicalizeAttention(),  # matmul-softmax-matmul -> one site
    EvaluateConstants(),  # masks that were regrouped for it
    ShareKeyHeads(),  # keys repeated for groups of queries are stored once
    CanonicalizeThreshold(),  # every threshold -> thresher::shrink
)

#: The same function, smaller. The default of compile().
exact = (
    *canonicalize,
    FoldBatchNorm(),  # batch norm into its neighbours
    FoldScale(),  # constant factors into the layer before
    MergeDuplicates(),  # equal channels are read once
    FoldVocabulary(),  # equal rows of embeddings are stored once
    PermuteChannels(),  # what is dead on one side to the end
    FoldChannels(),  # what pruning left behind
    Simplify(),  # what folding left behind
    SkipMaskedBlocks(),  # scores that constant masks forbid
)

#: Not the same function: cheaper within a budget. They need calibration samples.
approximate = (
    DropSublayers(),  # branches that change little
    ReduceTokens(),  # layers pass fewer tokens on
    ShareAttention(),  # weights of the layer before
    PoolValues(),  # means instead of attentions that do little more
    PoolKeys(),  # means of neighbouring keys
    SparseAttention(),  # heads look at fewer blocks of keys
    PyramidAttention(),  # near keys, and means of the others, where all are looked at yet
    SkipSmallWeights(),  # weights that turn out small
    SelectNeurons(),  # neurons that matter for what is read
    ThresholdActivations(),  # small activations are 0, where zeros are skipped
)

#: Nothing but the capture.
none = ()

#: The form that TVM's kernels run best; the driver appends it for that backend.
specialize = (Simplify(), ChannelsLast(), SkipPrunedWeights(), SkipZeros())

NAMED = {"exact": exact, "canonicalize": canonicalize, "approximate": approximate, "none": none}


def resolve(passes: Passes) -> list[str | Pass]:
    """Return the passes in order: the name of a pipeline stands for its passes, everything else for itself."""
    items = [passes] if isinstance(passes, str) else passes
    return [p for item in items for p in (NAMED[item] if isinstance(item, str) and item in NAMED else [item])]
