"""The ``thresher::`` operators: schema, reference in plain torch (differentiable), fake implementation."""

import thresher.ops.channels_last
import thresher.ops.checking
import thresher.ops.expert_linear
import thresher.ops.kth_largest
import thresher.ops.norms
import thresher.ops.pruned_linear
import thresher.ops.pyramid_lists
import thresher.ops.select_blocks
import thresher.ops.shrink
import thresher.ops.sparse_attention
import thresher.ops.sparse_linear
import thresher.ops.tokens  # noqa: F401
