"""Weights in few bits: the numbers are those that `formats.dequantize` says, wherever a weight lives."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.passes.retarget.retarget_opset import RetargetOpset
from onnxopt.pipeline import Pipeline
from onnxopt.quantization.formats import dequantize, find_format
from onnxopt.quantization.weights import quantize_weight, ternarize
from onnxopt.recipe import parse_pass
from onnxopt.runtimes import open_session
from tests.passes.weighted import LAYERS, layer, stored, weight_of
from tests.support import Rewritten, execute, random_feeds, run_pass, sqnr, text_model


def with_weights(model: onnx.ModelProto, change: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model with other floats as weights, which the runtime does not know to be constant."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        if tensor.name in change:
            name = f"{tensor.name}_changed"
            other.graph.node.insert(0, helper.make_node("Identity", [name], [tensor.name]))
            tensor.CopyFrom(numpy_helper.from_array(change[tensor.name], name))
    return other


def rounded(array: np.ndarray, kind: str, axis: int | None, **how: bool | int) -> np.ndarray:
    form = find_format(kind)
    ints, params = quantize_weight(array, form, axis=axis, **how)  # type: ignore[arg-type]
    return dequantize(ints if form.is_float else ints.astype(np.int32), params)


def assert_bit_equal(want: onnx.ModelProto, have: Rewritten) -> None:
    feeds = random_feeds(want)
    for a, b in zip(execute(want, feeds), execute(have.model, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4", "int16", "float8e4m3fn", "float8e5m2"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_numbers_that_are_stored(name: str, kind: str, symmetric: bool) -> None:
    model, axis = layer(name), LAYERS[name][3]
    done = run_pass(model, QuantizeWeights(kind, symmetric=symmetric, minimum=1))
    floats = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert done.changes == done.count("DequantizeLinear") == len(floats)
    want = {key: rounded(array, kind, axis, symmetric=symmetric) for key, array in floats.items()}
    assert_bit_equal(with_weights(model, want), done)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("kind", ["int8", "int4", "uint4"])
@pytest.mark.parametrize(
    ("name", "axis"), [("MatMul", 0), ("Gemm", 0), ("MatMul stack", 1), ("MatMul left", 1), ("Gemm left", 1)]
)
def test_blocks_run_along_the_axis_that_is_summed_up(name: str, axis: int, kind: str, block: int) -> None:
    model = layer(name)
    done = run_pass(model, QuantizeWeights(kind, block=block))
    assert done.changes == 1
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert_bit_equal(with_weights(model, {"w": rounded(w, kind, axis, block=block)}), done)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("kind", ["int8", "int4", "uint8", "uint4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("call", ["MatMul(x, w)", "Gemm(x, w)", "Gemm(x, w, c)", "Gemm<transB = 1>(x, w, c)"])
def test_matmulnbits_holds_the_same_numbers(call: str, symmetric: bool, kind: str, block: int) -> None:
    turned = "transB" in call
    c = "<float[1, 5] c = {1, 2, 3, 4, 5}>" if " c)" in call else ""
    model = stored(
        text_model(f"agraph (float[3, 140] x) => (float[3, 5] y) {c} {{ y = {call} }}"),
        {"w": weight_of((5, 140) if turned else (140, 5))},
    )
    done = run_pass(model, QuantizeWeights(kind, block=block, symmetric=symmetric, form="matmulnbits"))
    assert done.op_types[0] == "MatMulNBits"
    w = numpy_helper.to_array(model.graph.initializer[-1])
    want = with_weights(model, {"w": rounded(w, kind, int(turned), block=block, symmetric=symmetric)})
    exact = next(node for node in done.model.graph if node.op_type == "MatMulNBits")
    exact.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)  # float32 activations
    feeds = random_feeds(model)
    assert sqnr(execute(want, feeds)[0], execute(done.model, feeds)[0]) > 100


STORES = ("initializer", "node", "identity", "transposed", "reshaped", "cast")


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["Conv2D", "MatMul", "LSTM"])
def test_where_a_weight_lives_changes_nothing(name: str, store: str) -> None:
    model, axis = layer(name, store=store), LAYERS[name][3]
    done = run_pass(model, QuantizeWeights(minimum=1))
    assert done.op_types.count("DequantizeLinear") == (2 if name == "LSTM" else 1)
    assert not {"Transpose", "Reshape", "Identity", "Cast"} & set(done.op_types)
    tensors = {"w": weight_of(LAYERS[name][1])}
    if name == "LSTM":
        tensors["r"] = weight_of((1, 20, 5), 1)
    if store == "cast":
        tensors = {key: array.astype(np.float16).astype(np.float32) for key, array in tensors.items()}
    want = {key: rounded(array, "int8", axis) for key, array in tensors.items()}
    assert_bit_equal(with_weights(layer(name), want), done)


def test_a_tied_embedding_is_stored_once_and_only_its_rows_are_dequantized() -> None:
    model = stored(
        text_model(
            """agraph (int64[1, 3] ids) => (float[1, 3, 50] y) {
                e = Gather(w, ids)
                t = Transpose(w)
                y = MatMul(e, t)
            }"""
        ),
        {"w": weight_of((50, 16))},
    )
    done = run_pass(model, QuantizeWeights())
    assert done.op_types == ["DequantizeLinear", "Gather", "Cast", "Gather", "Mul", "Transpose", "MatMul"]
    quantized = [
        t for t in done.model.graph.initializers.values() if t.dtype == ir.DataType.INT8 and t.uses()
    ]
    assert len(quantized) == 1
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert_bit_equal(with_weights(model, {"w": rounded(w, "int8", 0)}), done)


def test_a_vector_has_one_scale() -> None:
    model = stored(
        text_model("agraph (float[3, 70] x) => (float[3] y) { y = MatMul(x, w) }"), {"w": weight_of((70,))}
    )
    done, feeds = run_pass(model, QuantizeWeights()), random_feeds(model)
    w = rounded(numpy_helper.to_array(model.graph.initializer[0]), "int8", None)
    assert done.count("DequantizeLinear") == 1
    assert sqnr(execute(with_weights(model, {"w": w}), feeds)[0], execute(done.model, feeds)[0]) > 130


def test_readers_that_disagree_share_one_scale_or_none_at_all() -> None:
    text = """agraph (float[2, 20] x, float[2, 16] z) => (float[2, 16] y, float[2, 20] u) {
        y = MatMul(x, w)
        u = Gemm<transB = 1>(z, w)
    }"""
    model = stored(text_model(text), {"w": weight_of((20, 16))})
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert_bit_equal(with_weights(model, {"w": rounded(w, "int8", None)}), run_pass(model, QuantizeWeights()))
    done = run_pass(model, QuantizeWeights("int4"))
    assert set(done.declined) == {"the weight has readers with output channels in different axes"}
    done = run_pass(model, QuantizeWeights("int4", block=8))
    assert set(done.declined) == {"the weight has readers that sum it up along different axes"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_embedding_is_dequantized_row_by_row(axis: int, kind: str, symmetric: bool) -> None:
    model = stored(
        text_model(f"agraph (int64[2, 3] ids) => (float[?, ?, ?] y) {{ y = Gather<axis = {axis}>(w, ids) }}"),
        {"w": weight_of((12, 16))},
    )
    done = run_pass(model, QuantizeWeights(kind, symmetric=symmetric))
    assert done.count("DequantizeLinear") == 0
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert_bit_equal(with_weights(model, {"w": rounded(w, kind, axis, symmetric=symmetric)}), done)
    assert run_pass(model, QuantizeWeights("int4")).declined == (
        "Gather takes no int4: embeddings are for int8 or uint8",
    )


@pytest.mark.parametrize("block", [0, 16])
def test_a_gemm_that_transposes_reads_its_weight_transposed(block: int) -> None:
    model = stored(
        text_model(
            """<ir_version: 10, opset_import: ["": 21]>
            agraph (float[3, 40] x, float[8] c) => (float[3, 8] y) { y = Gemm<transB = 1>(x, w, c) }"""
        ),
        {"w": weight_of((8, 40))},
    )
    done = run_pass(model, QuantizeWeights("int4", block=block))
    assert "transB" not in done.model.graph[-1].attributes
    w = numpy_helper.to_array(model.graph.initializer[0])
    want = with_weights(model, {"w": rounded(w, "int4", int(block > 0), block=block)})
    feeds = random_feeds(model)
    assert sqnr(execute(want, feeds)[0], execute(done.model, feeds)[0]) > 120


IN_BODY = """agraph (float[3, 8] x, bool b) => (float[3, 8] y) <float[8, 8] w> {
    y = If (b) <
        then_branch = yes () => (float[3, 8] p) { p = MatMul(x, w) },
        else_branch = no () => (float[3, 8] q) {
            k = Constant<value = float[8, 8] {WEIGHT}>()
            q = MatMul(x, k)
        }
    >
}"""


def test_weights_in_branches_are_quantized_where_they_stand() -> None:
    numbers = ", ".join(str(i % 13 - 6) for i in range(64))
    model = text_model(IN_BODY.replace("WEIGHT", numbers).replace("> {", f" = {{{numbers}}}> {{", 1))
    done = run_pass(model, QuantizeWeights())
    assert done.changes == 2
    assert [node.op_type for node in done.model.graph] == ["DequantizeLinear", "If"]
    for branch in (True, False):
        feeds = {**random_feeds(model), "b": np.array(branch)}
        assert sqnr(execute(model, feeds)[0], execute(done.model, feeds)[0]) > 35


def test_a_weight_of_float16_is_a_dequantized_one_that_is_cast() -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["": 21]>
        agraph (float16[3, 40] x) => (float16[3, 8] y) { y = MatMul(x, w) }"""
    )
    half = weight_of((40, 8)).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(half, "w"))
    done = run_pass(model, QuantizeWeights())
    assert done.op_types == ["DequantizeLinear", "Cast", "MatMul"]
    want = rounded(half.astype(np.float32), "int8", 1).astype(np.float16)
    feeds = random_feeds(model)  # the runtime computes in float32, and leaves the weight there
    assert sqnr(execute(with_weights(model, {"w": want}), feeds)[0], execute(done.model, feeds)[0]) > 60
    assert run_pass(model, QuantizeWeights("int16")).declined == ("the weight would not become smaller",)


def test_a_weight_that_a_loop_reads_is_dequantized_in_front_of_it() -> None:
    model = stored(
        text_model(
            """agraph (float[3, 8] x, int64 n) => (float[3, 8] y) <bool t = {1}> {
                y = Loop (n, t, x) <body = turn (int64 i, bool c, float[3, 8] a) => (bool d, float[3, 8] e) {
                    d = Identity(c)
                    z = MatMul(a, w)
                    e = Tanh(z)
                }>
            }"""
        ),
        {"w": weight_of((8, 8))},
    )
    done = run_pass(model, QuantizeWeights())
    assert [node.op_type for node in done.model.graph] == ["DequantizeLinear", "Loop"]
    feeds = {**random_feeds(model), "n": np.array(3)}
    assert sqnr(execute(model, feeds)[0], execute(done.model, feeds)[0]) > 25


def test_below_ir_version_4_constants_are_nodes() -> None:
    model = layer("MatMul", 13, "node")
    model.ir_version = 3
    done = run_pass(model, QuantizeWeights())
    assert done.op_types == ["Constant", "Constant", "DequantizeLinear", "MatMul"]
    want = rounded(weight_of((40, 8)), "int8", 1)
    assert_bit_equal(with_weights(layer("MatMul"), {"w": want}), done)


def test_the_weight_of_a_fused_attention() -> None:
    model = stored(
        text_model(
            """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
            agraph (float[2, 5, 16] x) => (float[2, 5, 16] y) {
                y = com.microsoft.Attention<num_heads = 2>(x, w, b)
            }"""
        ),
        {"w": weight_of((16, 48)), "b": weight_of((48,))},
    )
    done = run_pass(model, QuantizeWeights())
    assert_bit_equal(with_weights(model, {"w": rounded(weight_of((16, 48)), "int8", 1)}), done)


def test_a_weight_in_a_function_is_quantized_there() -> None:
    numbers = ", ".join(str(i % 13 - 6) for i in range(64))
    model = text_model(
        f"""<ir_version: 10, opset_import: ["": 21, "my": 1]>
        agraph (float[3, 8] x) => (float[3, 8] y) {{ y = my.twice(x) }}
        <domain: "my", opset_import: ["": 21]> twice (x) => (y) {{
            w = Constant<value = float[8, 8] {{{numbers}}}>()
            y = MatMul(x, w)
        }}"""
    )
    done = run_pass(model, QuantizeWeights())
    function = next(iter(done.model.functions.values()))
    assert [node.op_type for node in function] == ["Constant", "Constant", "DequantizeLinear", "MatMul"]
    feeds = random_feeds(model)
    assert sqnr(execute(model, feeds)[0], execute(done.model, feeds)[0]) > 35


@pytest.mark.parametrize(("kind", "fewest"), [("int8", 40), ("int4", 15)])
@pytest.mark.parametrize("name", ["MatMul", "Gemm"])
def test_the_runtime_fuses_to_the_same_product(name: str, kind: str, fewest: float) -> None:
    model = layer(name)
    done = run_pass(model, QuantizeWeights(kind, block=16 if kind == "int4" else 0))
    feeds = random_feeds(model)
    with open_session(done.model) as session:
        have = session.run(feeds)["y"]
    assert sqnr(execute(done.model, feeds)[0], have) > 35
    assert sqnr(execute(model, feeds)[0], have) > fewest


@pytest.mark.parametrize(("levels", "threshold"), [("binary", 0.0), ("ternary", 0.7)])
def test_binary_and_ternary_levels(levels: Literal["binary", "ternary"], threshold: float) -> None:
    model = layer("Conv2D")
    done = run_pass(model, QuantizeWeights("int4", levels=levels))
    w = numpy_helper.to_array(model.graph.initializer[0])
    ints, params = ternarize(w, find_format("int4"), axis=0, threshold=threshold)
    want = with_weights(model, {"w": dequantize(ints.astype(np.int32), params)})
    assert_bit_equal(want, done)


@pytest.mark.parametrize("kind", ["int2", "uint2"])
def test_two_bits(kind: str) -> None:
    model = layer("MatMul", opset=25)
    model.ir_version = 13
    done = run_pass(model, QuantizeWeights(kind))
    w = numpy_helper.to_array(model.graph.initializer[0])
    assert_bit_equal(with_weights(model, {"w": rounded(w, kind, 1)}), done)
    odd = stored(
        text_model(
            """<ir_version: 13, opset_import: ["": 25]>
            agraph (float[3, 32] x) => (float[3, 6] y) { y = MatMul(x, w) }"""
        ),
        {"w": weight_of((32, 6))},
    )
    assert run_pass(odd, QuantizeWeights(kind)).declined == (
        "ONNX Runtime gets products of 2 bits wrong unless the channels are a multiple of 4",
    )


def test_a_shared_weight_that_waits_for_its_opset_is_reported_once() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[3, 40] x) => (float[3, 8] y, float[3, 8] z) { y = MatMul(x, w) z = Gemm(x, w) }"""
    model = stored(text_model(text), {"w": weight_of((40, 8))})
    passes = (QuantizeWeights("int4"), RetargetOpset(21, on_demand=True))
    outcome = Pipeline(passes).run(lambda: ir.from_proto(model))
    assert [(step.changes, step.declined) for step in outcome.steps] == [(1, {}), (1, {})]


@pytest.mark.parametrize(
    ("opset", "one", "reason"),
    [
        (12, QuantizeWeights(), "DequantizeLinear by channel of int8 came with opset 13"),
        (20, QuantizeWeights("int4"), "DequantizeLinear by channel of int4 came with opset 21"),
        (20, QuantizeWeights(block=16), "DequantizeLinear in blocks of int8 came with opset 21"),
        (18, QuantizeWeights("float8e5m2"), "DequantizeLinear by channel of float8e5m2 came with opset 19"),
        (24, QuantizeWeights("int2"), "DequantizeLinear by channel of int2 came with opset 25"),
        (21, QuantizeWeights("int8", minimum=1000), "the weight has fewer than 1000 elements"),
        (21, QuantizeWeights("int16", block=1), "the weight would not become smaller"),
    ],
)
def test_what_is_declined_for_its_form(opset: int, one: QuantizeWeights, reason: str) -> None:
    assert run_pass(layer("MatMul", opset), one).declined == (reason,)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, over)", "the weight is a graph input (overridable; --freeze-initializers folds it)"),
        ("y = MatMul(x, z)", "the weight is computed at run time"),
        ("t = MatMul(x, w) y = Mul(t, w)", "the weight is also read by Mul"),
        ("y = MatMul(x, w) v = Identity(w)", "the weight is a graph output, too"),
        ("y = MatMul(x, nan)", "the weight is not finite, or not so in float32"),
    ],
)
def test_what_is_declined_for_its_readers(body: str, reason: str) -> None:
    numbers = ", ".join(["1"] * 64)
    outputs = "float[8, 8] y, float[8, 8] v" if " v " in body else "float[8, 8] y"
    model = text_model(
        f"agraph (float[8, 8] x, float[8, 8] z, float[8, 8] over) => ({outputs})"
        f"<float[8, 8] w = {{{numbers}}}, float[8, 8] over = {{{numbers}}}> {{ {body} }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(np.full((8, 8), np.nan, np.float32), "nan"))
    done = run_pass(model, QuantizeWeights())
    assert (done.changes, set(done.declined)) == (0, {reason})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("Gemm<alpha = 2.0>(x, w)", "MatMulNBits has no alpha, beta or transA"),
        ("MatMul(w, x)", "MatMulNBits is for the second factor of MatMul and Gemm"),
    ],
)
def test_what_matmulnbits_does_not_take(body: str, reason: str) -> None:
    model = stored(
        text_model(f"agraph (float[32, 32] x) => (float[32, 32] y) {{ y = {body} }}"),
        {"w": weight_of((32, 32))},
    )
    done = run_pass(model, QuantizeWeights("int4", block=16, form="matmulnbits"))
    assert (done.changes, done.declined) == (0, (reason,))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("type=int9", "unknown quantized type 'int9' .did you mean 'int8'"),
        ("block=-1", "block is -1"),
        (
            "form=matmulnbits",
            "matmulnbits takes 4 or 8 bit integers in blocks of 16 to 256; found int8 in blocks of 0",
        ),
        ("levels=binary,type=uint4", "binary levels are for signed integers, not uint4"),
    ],
)
def test_bad_options(options: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse_pass(f"quantize-weights{{{options}}}")
