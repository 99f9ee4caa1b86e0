"""Sizes pass through the runtime's own operators, which onnx knows nothing of."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxopt.evaluation import DimsOf
from onnxopt.scope import scopes
from tests.support import text_model


@pytest.mark.parametrize(
    ("body", "width"),
    [
        ("y = com.microsoft.BiasGelu(x, gamma)", "4"),
        ("y = com.microsoft.SkipLayerNormalization(x, x, gamma, gamma)", "4"),
        ("y = com.microsoft.MultiHeadAttention<num_heads=2>(x, x, v)", "6"),
        ("y = Attention<q_num_heads=4, kv_num_heads=2>(x, v, v)", "12"),
        ("y = com.microsoft.EmbedLayerNormalization(ids, , table)", "8"),
    ],
)
def test_the_sizes_of_a_fused_operator(body: str, width: str) -> None:
    model = ir.from_proto(
        text_model(f"""<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        agraph (float[batch,length,4] x, float[batch,length,6] v, int32[batch,length] ids, float[2,8] table)
        => (float[A,B,C] z) <float[4] gamma = {{1, 1, 1, 1}}> {{ {body} z = Neg(y) }}""")
    )
    (scope,) = scopes(model)
    dims, x = DimsOf()(scope), model.graph.inputs[0]
    found, source = dims.of(model.graph[0].outputs[0]), dims.of(x)
    assert found is not None
    assert source is not None
    assert found[:2] == source[:2]
    assert str(found[2]) == width
