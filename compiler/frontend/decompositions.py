"""The operators that a captured graph is made of: ATen after decomposition, except for those that passes and kernels know as a whole."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from thresher.errors import CaptureError
from thresher.frontend.fast_decompositions import fast_decompositions

#: Passes match on these, and the backend has kernels for them.
KEPT_WHOLE = frozenset(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear embedding matmul
    scaled_dot_product_attention layer_norm group_norm instance_norm rms_norm batch_norm softmax log_softmax
    silu hardswish hardsigmoid relu6 gelu elu selu celu mish leaky_relu softplus prelu threshold
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle""".split()
)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """Return ``exported`` in functional ATen operators, with those of KEPT_WHOLE as they are.

    Raises :class:`CaptureError` with torch's message where torch cannot decompose it.
    """
    table = torch.export.default_decompositions()
    for operator in list(table.keys()):
        if operator._schema.name.removeprefix("aten::") in KEPT_WHOLE:
            table.pop(operator)
    try:
        with fast_decompositions():
            return exported.run_decompositions(table)
    except Exception as error:
        raise CaptureError(f"torch cannot decompose the exported program: {str(error).strip()[:1500]}") from error
