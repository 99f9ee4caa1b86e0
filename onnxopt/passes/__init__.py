"""The passes that ship with onnxopt, one a file."""

from __future__ import annotations

if __name__ != "onnxopt.passes":
    raise ImportError(f"import onnxopt.passes, not {__name__!r}: the passes would exist twice")

from onnxopt.claims import Pass
from onnxopt.passes.cluster.cluster_weights import ClusterWeights
from onnxopt.passes.dedupe_initializers import DedupeInitializers
from onnxopt.passes.eliminate.eliminate_common_subexpressions import EliminateCommonSubexpressions
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.eliminate.eliminate_expand import EliminateExpand
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.passes.eliminate.eliminate_noop import EliminateNoop
from onnxopt.passes.eliminate.eliminate_pairs import EliminatePairs
from onnxopt.passes.eliminate.eliminate_zero_bias import EliminateZeroBias
from onnxopt.passes.factorize.factorize_weights import FactorizeWeights
from onnxopt.passes.fold.fold_batchnorm import FoldBatchnorm
from onnxopt.passes.fold.fold_constants import FoldConstants
from onnxopt.passes.fold.fold_shapes import FoldShapes
from onnxopt.passes.freeze_initializers import FreezeInitializers
from onnxopt.passes.fuse.fuse_activation import FuseActivation
from onnxopt.passes.fuse.fuse_attention import FuseAttention
from onnxopt.passes.fuse.fuse_bias_gelu import FuseBiasGelu
from onnxopt.passes.fuse.fuse_cache import FuseCache
from onnxopt.passes.fuse.fuse_dequantize import FuseDequantize
from onnxopt.passes.fuse.fuse_embed_layernorm import FuseEmbedLayernorm
from onnxopt.passes.fuse.fuse_groupnorm import FuseGroupnorm
from onnxopt.passes.fuse.fuse_gru import FuseGru
from onnxopt.passes.fuse.fuse_layernorm import FuseLayernorm
from onnxopt.passes.fuse.fuse_lstm import FuseLstm
from onnxopt.passes.fuse.fuse_mean import FuseMean
from onnxopt.passes.fuse.fuse_projections import FuseProjections
from onnxopt.passes.fuse.fuse_rmsnorm import FuseRmsnorm
from onnxopt.passes.fuse.fuse_rotary import FuseRotary
from onnxopt.passes.fuse.fuse_skip_layernorm import FuseSkipLayernorm
from onnxopt.passes.fuse.fuse_softmax import FuseSoftmax
from onnxopt.passes.fuse.fuse_space_to_depth import FuseSpaceToDepth
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.passes.inline_if import InlineIf
from onnxopt.passes.lift_constants import LiftConstants
from onnxopt.passes.merge.merge_affine import MergeAffine
from onnxopt.passes.merge.merge_arithmetic import MergeArithmetic
from onnxopt.passes.merge.merge_cast import MergeCast
from onnxopt.passes.merge.merge_clip import MergeClip
from onnxopt.passes.merge.merge_concat import MergeConcat
from onnxopt.passes.merge.merge_distant_layout import MergeDistantLayout
from onnxopt.passes.merge.merge_gemm import MergeGemm
from onnxopt.passes.merge.merge_layout import MergeLayout
from onnxopt.passes.merge.merge_matmul import MergeMatmul
from onnxopt.passes.merge.merge_normalization import MergeNormalization
from onnxopt.passes.merge.merge_pad import MergePad
from onnxopt.passes.merge.merge_parallel import MergeParallel
from onnxopt.passes.merge.merge_pieces import MergePieces
from onnxopt.passes.merge.merge_qdq import MergeQdq
from onnxopt.passes.merge.merge_reshape import MergeReshape
from onnxopt.passes.merge.merge_slice import MergeSlice
from onnxopt.passes.merge.merge_split import MergeSplit
from onnxopt.passes.merge.merge_squeeze import MergeSqueeze
from onnxopt.passes.merge.merge_transpose import MergeTranspose
from onnxopt.passes.prune.drop_layers import DropLayers
from onnxopt.passes.prune.prune_channels import PruneChannels
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.passes.prune.shrink_kernels import ShrinkKernels
from onnxopt.passes.quantize.dequantize import Dequantize
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.passes.quantize.quantize_floats import QuantizeFloats
from onnxopt.passes.quantize.quantize_relu import QuantizeRelu
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.passes.reorder_nodes import ReorderNodes
from onnxopt.passes.retarget.retarget_einsum import RetargetEinsum
from onnxopt.passes.retarget.retarget_gemm import RetargetGemm
from onnxopt.passes.retarget.retarget_opset import RetargetOpset
from onnxopt.passes.retarget.retarget_quantized import RetargetQuantized
from onnxopt.passes.unroll_loop import UnrollLoop

__all__ = ["BUILTIN"]

BUILTIN: tuple[type[Pass], ...] = (
    FreezeInitializers,
    InlineFunctions,
    LiftConstants,
    EliminateIdentity,
    InferShapes,
    RetargetOpset,
    FoldConstants,
    InlineIf,
    UnrollLoop,
    FoldShapes,
    EliminateExpand,
    EliminateNoop,
    EliminatePairs,
    MergeCast,
    RetargetEinsum,
    MergeReshape,
    MergeSqueeze,
    MergeTranspose,
    MergeLayout,
    MergeSlice,
    FuseSpaceToDepth,
    MergeConcat,
    MergePieces,
    MergeClip,
    MergePad,
    Dequantize,
    FuseDequantize,
    QuantizeRelu,
    RetargetQuantized,
    MergeQdq,
    FuseMean,
    FuseActivation,
    FuseSoftmax,
    FuseLayernorm,
    FuseLstm,
    FuseGru,
    FuseRmsnorm,
    FuseGroupnorm,
    MergeNormalization,
    FuseSkipLayernorm,
    FuseBiasGelu,
    FuseEmbedLayernorm,
    FuseRotary,
    FuseAttention,
    FuseCache,
    FuseProjections,
    FoldBatchnorm,
    MergeAffine,
    MergeMatmul,
    MergeArithmetic,
    MergeParallel,
    MergeGemm,
    RetargetGemm,
    EliminateZeroBias,
    MergeDistantLayout,
    MergeSplit,
    PruneChannels,
    DropLayers,
    ShrinkKernels,
    FactorizeWeights,
    QuantizeFloats,
    EliminateCommonSubexpressions,
    EliminateDead,
    DedupeInitializers,
    ReorderNodes,
    PruneWeights,
    QuantizeDynamic,
    QuantizeWeights,
    ClusterWeights,
)
"""In the order in which they run best."""
