"""A fixed part of every suite: each sample is equal, by our code or by torch's kernels.

The samples are every n-th name of a suite (without those that are counted apart), so nobody chose them; the models are small ones, because
most take too long for every run. All samples are ``make conformance``.
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.conformance.judge import judge
from benchmarks.conformance.suites import SUITES

SAMPLES = {
    "op_db": """
        cartesian_prod:float32:1 cumprod:float32:0 fmin:float32:2 logspace.tensor_overload:float32:2 std_mean:float32:2
        nn.functional.cross_entropy:float32:2 nn.functional.avg_pool1d:float32:1 nn.functional.unfold:float32:0
        nn.functional.max_pool2d:float32:2 nn.functional.mish:float32:1 mvlgamma.mvlgamma_p_5:float32:0 split:float32:0
        exp2:float32:0 reshape:float32:1 __getitem__:float32:0 repeat:float32:2 mH:float32:0 nn.functional.grid_sample:float32:1
        nn.functional.cosine_embedding_loss:float32:0 _segment_reduce.offsets:float32:2 linalg.det:float32:1
        linalg.slogdet:float32:0 signal.windows.hann:float32:0 special.bessel_j1:float32:0 special.spherical_bessel_j0:float32:2
    """,
    "op_db_dtypes": """
        expand:float64:0 nn.functional.max_unpool1d.grad:float64:0 bool:float64:0 nn.functional.nll_loss:float64:0
        bmm.triton_optimized:float64:0 nn.functional.pad.replicate_negative:int64:0 eye:int64:0
        special.modified_bessel_k1:int64:0 signbit:bool:0 argsort:bool:0 log10:complex64:0 linalg.svdvals:complex64:0
        isclose:float16:0 signbit:float16:0 lgamma:float16:0 clone:bfloat16:0 nn.functional.interpolate.area:bfloat16:0
        sort:bfloat16:0 hash_tensor:bfloat16:0
    """,
    "module_db": """
        nn_AdaptiveMaxPool3d:1 nn_BatchNorm2d:6 nn_Linear:0 nn_MSELoss:5 nn_NLLLoss:8 nn_CrossEntropyLoss:0 nn_GroupNorm:4
        nn_LayerNorm:5 nn_Transformer:2 nn_PReLU:7 nn_Softsign:0 nn_LSTM:4 nn_ConstantPad1d:1
    """,
    "onnx_nodes": """
        test_ai_onnx_ml_tree_ensemble_single_tree test_attention_4d_diff_heads_sizes_scaled_expanded test_attention_3d
        test_attention_4d_softcap_neginf_mask_poison_expanded
        test_averagepool_3d_dilations_large_count_include_pad_is_0_ceil_mode_is_True test_bitwise_xor_i32_2d
        test_cast_no_saturate_FLOAT16_to_FLOAT8E5M2FNUZ test_causal_conv_with_state_swish_alias_expanded test_col2im_pads
        test_cumsum_2d_int32 test_dynamicquantizelinear_min_adjusted_expanded test_flexattention_relative_positional
        test_gridsample_border_padding test_layer_normalization_3d_axis_negative_1_epsilon test_logsoftmax_example_1
        test_max_uint32 test_mod_uint16 test_nonmaxsuppression_two_batches test_quantizelinear_axis
        test_reduce_l1_negative_axes_keep_dims_example_expanded test_reduce_sum_keepdims_example
        test_resize_upsample_sizes_nearest_floor_align_corners test_simple_rnn_batchwise test_shape_example
        test_sce_sum_log_prob test_softsign_example_expanded_ver18 test_sum_one_input test_tril_zero
    """,
    "onnx_models": """
        pytorch-operator/test_operator_exp pytorch-converted/test_AvgPool1d_stride
        pytorch-converted/test_Conv2d_depthwise_with_multiplier pytorch-converted/test_Linear_no_bias
        pytorch-converted/test_Softmin simple/test_sign_model
    """,
    "torchvision": """
        squeezenet1_1
    """,
    "transformers": """
        albert bert gpt2 vit
    """,
}


@pytest.mark.parametrize(("suite", "name"), [(s, n) for s, names in SAMPLES.items() for n in names.split()])
def test_sample(suite: str, name: str) -> None:
    verdict = judge(partial(SUITES[suite].build, name))
    assert verdict.outcome in ("equal", "library"), f"{verdict.outcome}: {verdict.reason}"
