"""Weights of shared numbers: what is computed is what the codebook says, and the file is smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.passes.cluster.cluster_weights import ClusterWeights
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.fold.fold_constants import FoldConstants
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.pipeline import Pipeline
from onnxopt.protobuf import dump
from onnxopt.pruning.codebooks import codebook_of
from onnxopt.pruning.weights import find_weights, sparsity
from onnxopt.recipe import parse_pass
from tests.passes.weighted import LAYERS, layer, weight_of
from tests.support import Rewritten, execute, random_feeds, run_pass, text_model

TYPES = {8: ir.DataType.UINT8, 4: ir.DataType.UINT4, 2: ir.DataType.UINT2}


def with_codebooks(model: onnx.ModelProto, bits: int) -> onnx.ModelProto:
    """The model with each weight as its codebook says, which the runtime does not know to be constant."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    for tensor in other.graph.initializer:
        array = numpy_helper.to_array(tensor)
        book, codes = codebook_of(array.astype(np.float32), 1 << bits)
        other.graph.node.insert(0, helper.make_node("Identity", [f"{tensor.name}_shared"], [tensor.name]))
        tensor.CopyFrom(numpy_helper.from_array(book.astype(array.dtype)[codes], f"{tensor.name}_shared"))
    return other


def assert_same(want: onnx.ModelProto, have: Rewritten) -> None:
    feeds = random_feeds(want)
    for a, b in zip(execute(want, feeds), execute(have.model, feeds), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_shared_numbers(name: str, bits: int) -> None:
    model = layer(name)
    done = run_pass(model, ClusterWeights(bits, small=1, depthwise=True))
    assert done.changes == done.count("Gather") == len(model.graph.initializer)
    assert_same(with_codebooks(model, bits), done)


@pytest.mark.parametrize("store", ["node", "transposed", "reshaped", "identity"])
@pytest.mark.parametrize("name", ["Conv2D", "Gemm", "MatMul", "LSTM"])
def test_weights_are_shared_wherever_they_are_stored(name: str, store: str) -> None:
    model = layer(name, store=store)
    done = run_pass(model, ClusterWeights(4))
    assert done.changes >= 1
    assert_same(with_codebooks(layer(name), 4), done)


@pytest.mark.parametrize(
    ("opset", "bits", "packed", "stored"),
    [
        (13, 5, False, 8),
        (13, 2, False, 8),
        (21, 4, True, 4),
        (21, 2, True, 4),
        (25, 2, True, 2),
        (25, 3, True, 4),
        (25, 5, True, 8),
    ],
)
def test_codes_take_few_bits_and_the_runtime_folds_them_at_load(
    opset: int, bits: int, packed: bool, stored: int, tmp_path: Path
) -> None:
    model = layer("MatMul", opset)
    model.ir_version = 13 if opset == 25 else 10
    done = run_pass(model, ClusterWeights(bits, packed=packed))
    assert done.op_types == ["Cast", "Gather", "MatMul"]
    codes = next(value for name, value in done.model.graph.initializers.items() if name.endswith("codes"))
    assert codes.dtype == TYPES[stored]
    assert_same(with_codebooks(model, bits), done)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(dump(done.model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == ["MatMul"]


def test_the_file_takes_a_quarter_and_packed_an_eighth() -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["": 21]>
        agraph (float[3, 256] x) => (float[3, 128] y) { y = MatMul(x, w) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(weight_of((256, 128)), "w"))

    def size(one: ClusterWeights) -> int:
        done = Pipeline((one, EliminateDead())).run(lambda: ir.from_proto(model))
        return len(dump(done.model).SerializeToString())

    before = model.ByteSize()
    assert size(ClusterWeights(8)) < 0.29 * before
    assert size(ClusterWeights(4, packed=True)) < 0.13 * before


@pytest.mark.parametrize("name", ["Conv2D", "Gemm", "MatMul", "depthwise"])
def test_groups_of_output_channels_have_numbers_of_their_own(name: str) -> None:
    model, axis = layer(name), LAYERS[name][3]
    done = run_pass(model, ClusterWeights(3, groups=2, small=1, depthwise=True))
    array = numpy_helper.to_array(model.graph.initializer[0])
    parts = []
    for part in np.split(array, 2, axis or 0):
        book, codes = codebook_of(part, 8)
        parts.append(book[codes])
    want = onnx.ModelProto()
    want.CopyFrom(model)
    want.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.concatenate(parts, axis or 0), "w"))
    assert_same(want, done)


def test_what_is_pruned_stays_pruned() -> None:
    model = layer("MatMul")
    pruned = Pipeline((PruneWeights(0.8), ClusterWeights(3))).run(lambda: ir.from_proto(model)).model
    held = {name.rsplit("_", 1)[-1]: value.const_value for name, value in pruned.graph.initializers.items()}
    codes, book = held["codes"], held["codebook"]
    assert codes is not None
    assert book is not None
    assert book.numpy()[0] == 0
    assert np.count_nonzero(codes.numpy() == 0) == 256
    assert np.count_nonzero(book.numpy()[codes.numpy()] == 0) == 256


def test_an_embedding_and_a_product_share_one_table() -> None:
    model = text_model(
        """agraph (int64[3] i) => (float[3, 20] y) { e = Gather(w, i)  t = Transpose(w)  y = MatMul(e, t) }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(weight_of((20, 16)), "w"))
    done = run_pass(model, ClusterWeights(4))
    assert done.changes == 1
    assert_same(with_codebooks(model, 4), done)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_keep_their_type(dtype: Any) -> None:
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    model = text_model(f"agraph ({kind}[3, 16] x) => ({kind}[3, 16] y) {{ y = MatMul(x, w) }}")
    model.graph.initializer.append(numpy_helper.from_array(weight_of((16, 16)).astype(dtype), "w"))
    done = run_pass(model, ClusterWeights(4))
    assert done.changes == 1
    assert_same(with_codebooks(model, 4), done)


BODY = """agraph (float[3, 8] x, bool b) => (float[3, 8] y) {
    y = If (b) <
        then_branch = yes () => (float[3, 8] p) { p = MatMul(x, w) },
        else_branch = no () => (float[3, 8] q) {
            k = Constant<value = float[8, 8] {WEIGHT}>()
            q = MatMul(x, k)
        }
    >
}"""


def test_weights_in_branches() -> None:
    words = ", ".join(str(i % 7) for i in range(64))
    model = text_model(BODY.replace("WEIGHT", words))
    model.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    done = run_pass(model, ClusterWeights(4))
    assert done.changes == 2
    for branch in (True, False):
        feeds = {**random_feeds(model), "b": np.array(branch)}
        want = execute(with_codebooks(model, 4), feeds)[0]
        np.testing.assert_array_equal(want, execute(done.model, feeds)[0])


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("MatMul", QuantizeWeights("int8")),
        ("MatMul", QuantizeWeights("uint8", symmetric=False, minimum=1)),
        ("MatMul", QuantizeWeights("int4", minimum=1)),
        ("MatMul", QuantizeDynamic()),
        ("Conv2D", QuantizeWeights("int8", minimum=1)),
    ],
)
def test_integers_share_few_values_and_zeros_stay(name: str, before: Any) -> None:
    model = run_pass(layer(name), before).model
    PruneWeights(0.5, small=1)(model)
    (want,) = find_weights(model)
    array = want.stored()
    done = run_pass(dump(model), ClusterWeights(3))
    assert want.tensor.dtype.is_integer()
    (have,) = find_weights(done.model)
    assert done.changes == 1
    assert (have.tensor.dtype, have.shape) == (want.tensor.dtype, want.shape)
    zero = want.zeros(array)
    np.testing.assert_array_equal(have.stored()[zero], array[zero])
    assert len(np.unique(have.stored()[~zero])) <= 7
    shared, was = (one.numbers(stored) for one, stored in ((have, have.stored()), (want, array)))
    assert np.square(shared - was).mean() < 0.05 * np.square(was).mean()
    assert run_pass(dump(done.model), ClusterWeights(3)).changes == 0


def test_integers_that_stay_say_why() -> None:
    model = dump(run_pass(layer("MatMul"), QuantizeWeights("int8")).model)
    assert run_pass(model, ClusterWeights(small=500)).declined == ("the weight has fewer than 500 elements",)
    assert run_pass(model, ClusterWeights(layers=("Conv",))).changes == 0


def _overridable(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [40, 8]))


def _read_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["w"], ["n"]))


def _nothing(model: onnx.ModelProto) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "how", "reason"),
    [
        (_overridable, {}, "the weight is a graph input (overridable; --freeze-initializers folds it)"),
        (_read_elsewhere, {}, "the weight is also read by Neg"),
        (_nothing, {"small": 500}, "the weight has fewer than 500 elements"),
        (_nothing, {"bits": 8}, "the weight would not become smaller"),
        (_nothing, {"bits": 4, "packed": True}, "Cast of uint4 came with opset 21"),
        (_nothing, {"groups": 3}, "its 8 output channels are no multiple of 3 groups"),
    ],
)
def test_weights_that_stay_say_why(change: Any, how: dict[str, Any], reason: str) -> None:
    model = layer("MatMul", 17)
    change(model)
    done = run_pass(model, ClusterWeights(**how))
    assert (done.changes, done.declined) == (0, (reason,))


def test_depthwise_weights_stay_unless_they_are_wanted() -> None:
    done = run_pass(layer("depthwise"), ClusterWeights(2))
    assert (done.changes, done.declined) == (0, ("the weight is depthwise",))


def test_only_the_wanted_operators() -> None:
    assert run_pass(layer("MatMul"), ClusterWeights(layers=("Conv",))).changes == 0
    assert run_pass(layer("MatMul"), ClusterWeights(layers=("MatMul",))).changes == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bits=1", "bits is 1; expected 2 to 8"),
        ("bits=9", "bits is 9; expected 2 to 8"),
        ("groups=0", "0 groups of 32 numbers; codes of a byte tell 256 apart"),
        ("bits=6,groups=8", "8 groups of 64 numbers; codes of a byte tell 256 apart"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_pass(f"cluster-weights{{{text}}}")
    assert str(error.value) == f"cluster-weights: {problem}"


def test_clustered_weights_are_pruned_where_their_codebook_has_a_zero() -> None:
    model = layer("MatMul")
    sparse = Pipeline((PruneWeights(0.3), ClusterWeights(4))).run(lambda: ir.from_proto(model)).model
    (before,) = sparsity(sparse)
    assert before.weight == "w"
    assert before.share == pytest.approx(0.3, abs=0.01)
    done = run_pass(dump(sparse), PruneWeights(0.6))
    assert done.changes == 1
    assert sparsity(done.model)[0].share == pytest.approx(0.6, abs=0.01)
    done = run_pass(dump(run_pass(model, ClusterWeights(4)).model), PruneWeights(0.6))
    assert (done.changes, done.declined) == (0, ("the weight shares numbers of which none is zero",))


@pytest.mark.parametrize("groups", [1, 2])
def test_folding_leaves_small_codebooks_alone(groups: int) -> None:
    model = layer("MatMul")
    done = run_pass(model, ClusterWeights(3, groups=groups))
    folded = run_pass(dump(done.model), FoldConstants())
    assert folded.op_types == ["Cast", "Gather", "MatMul"]
    assert set(folded.declined) == {"it keeps a weight in a codebook"}
