"""The passes that ship with onnxopt, one a file."""

from __future__ import annotations

if __name__ != "onnxopt.passes":
    raise ImportError(f"import onnxopt.passes, not {__name__!r}: the passes would exist twice")

from onnxopt.claims import Pass
from onnxopt.passes.dedupe_initializers import DedupeInitializers
from onnxopt.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from onnxopt.passes.eliminate_dead import EliminateDead
from onnxopt.passes.eliminate_expand import EliminateExpand
from onnxopt.passes.eliminate_identity import EliminateIdentity
from onnxopt.passes.eliminate_noop import EliminateNoop
from onnxopt.passes.fold_batchnorm import FoldBatchnorm
from onnxopt.passes.fold_constants import FoldConstants
from onnxopt.passes.fold_shapes import FoldShapes
from onnxopt.passes.freeze_initializers import FreezeInitializers
from onnxopt.passes.fuse_space_to_depth import FuseSpaceToDepth
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.passes.lift_constants import LiftConstants
from onnxopt.passes.merge_affine import MergeAffine
from onnxopt.passes.merge_cast import MergeCast
from onnxopt.passes.merge_clip import MergeClip
from onnxopt.passes.merge_concat import MergeConcat
from onnxopt.passes.merge_distant_layout import MergeDistantLayout
from onnxopt.passes.merge_layout import MergeLayout
from onnxopt.passes.merge_matmul import MergeMatmul
from onnxopt.passes.merge_pad import MergePad
from onnxopt.passes.merge_pieces import MergePieces
from onnxopt.passes.merge_reshape import MergeReshape
from onnxopt.passes.merge_slice import MergeSlice
from onnxopt.passes.merge_split import MergeSplit
from onnxopt.passes.merge_squeeze import MergeSqueeze
from onnxopt.passes.merge_transpose import MergeTranspose
from onnxopt.passes.retarget_einsum import RetargetEinsum

__all__ = ["BUILTIN"]

BUILTIN: tuple[type[Pass], ...] = (
    FreezeInitializers,
    InlineFunctions,
    LiftConstants,
    EliminateIdentity,
    InferShapes,
    FoldConstants,
    FoldShapes,
    EliminateExpand,
    EliminateNoop,
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
    FoldBatchnorm,
    MergeAffine,
    MergeMatmul,
    MergeDistantLayout,
    MergeSplit,
    EliminateCommonSubexpressions,
    EliminateDead,
    DedupeInitializers,
)
"""In the order in which they run best."""
