"""The built-in pipelines, readable as a table of contents."""

from collections.abc import Sequence
from typing import Any

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
from thresher.rewriting.pipeline import Pipeline, read_changed
from thresher.rewriting.registry import pass_names, unknown_pass

#: A pipeline by name, a pass as text, or a list of both and of instances.
Passes = str | Sequence[str | Pass]

#: One spelling for each thing.
canonicalize = Pipeline(
    EvaluateConstants(),  # masks, parametrizations, position grids
    ComplexNumbers(),  # pairs of real numbers; Fourier transforms are products
    Simplify(),  # no-ops, split -> slice, x @ W -> linear
    CanonicalizeAttention(),  # matmul-softmax-matmul -> one site
    EvaluateConstants(),  # masks that were regrouped for it
    ShareKeyHeads(),  # keys repeated for groups of queries are stored once
    CanonicalizeThreshold(),  # every threshold -> thresher::shrink
)

#: The same function, smaller. The default of compile().
exact = Pipeline(
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
approximate = Pipeline(
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
none = Pipeline()

#: The form that TVM's kernels run best; the driver appends it for that backend.
specialize = Pipeline(Simplify(), ChannelsLast(), SkipPrunedWeights(), SkipZeros())

NAMED = {"exact": exact, "canonicalize": canonicalize, "approximate": approximate, "none": none}


def resolve(passes: Passes | Pass) -> list[str | Pass]:
    """Return the passes in order: a pipeline, by its name or as it is changed in a text, stands for its passes.

    Raises :class:`PassError` for a name that neither a pipeline nor a pass has.
    """
    items: list[Any] = list(passes) if isinstance(passes, (list, tuple)) else [passes]
    return [p for item in items for p in (_of_text(item) if isinstance(item, str) else [item])]


def _of_text(text: str) -> Sequence[str | Pass]:
    pipeline = read_changed(text, NAMED)
    if pipeline is not None:
        return pipeline
    if (name := text.partition("{")[0]) not in pass_names():
        raise unknown_pass(name, NAMED)
    return [text]
