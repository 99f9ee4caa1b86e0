"""`prune`: what is cut and said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import onnxopt
from onnxopt.errors import UsageError
from onnxopt.examples import text_model
from tests.pruning.small import WIDTH, net, prune, residual, samples, zeros


def test_zeros_are_written_counted_and_told() -> None:
    result = onnxopt.prune(net(), "prune-weights{sparsity=0.5,small=0}", data=samples(), bench=False)
    report = result.report
    assert report.ok
    assert zeros(result.model, "u") == 0.5
    assert report.zeros == pytest.approx(0.5)
    assert {one.weight: one.share for one in report.layers} == {"u": 0.5, "v": 0.5}
    assert any("no faster" in sentence for sentence in report.savings)
    assert report.before.macs == report.after.macs
    assert report.packed is None or report.packed[1] < report.packed[0]
    held = json.loads(json.dumps(report.to_dict()))
    assert held["schema"] == "onnxopt.prune/1"
    assert held["passes"] == ["prune-weights{sparsity=0.5,small=0}"]


def test_zeros_of_shared_numbers_count() -> None:
    spelled = "prune-weights{sparsity=0.75,small=0},cluster-weights{bits=3,small=0}"
    report = onnxopt.prune(net(), spelled, data=samples(), bench=False).report
    assert report.zeros == pytest.approx(0.75)
    assert [one.elements for one in report.layers] == [16 * WIDTH, WIDTH * 10]


def test_channels_are_cut_and_fewer_products_left() -> None:
    result = onnxopt.prune(net(), "prune-channels{macs=0.5,multiple=1}", data=samples(), bench=False)
    report = result.report
    assert report.ok
    assert isinstance(report.before.macs, int)
    assert isinstance(report.after.macs, int)
    assert report.after.macs <= report.before.macs / 2
    assert any("multiply-adds are left" in sentence for sentence in report.savings)
    assert not isinstance(result.model, bytes | ir.Model)
    assert [one.dims[1] for one in result.model.graph.initializer if one.name == "u"] < [WIDTH]


@pytest.mark.parametrize("passes", ["prune-weights{score=obs}", "drop-layers"])
def test_a_pass_that_needs_data_says_so_at_once(passes: str) -> None:
    done: list[str] = []
    with pytest.raises(UsageError, match="samples"):
        onnxopt.prune(residual(), passes, bench=False, progress=lambda what, _share: done.append(what))
    assert done == ["reading the model", "making up samples"]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_samples_without_numbers_are_refused(number: float) -> None:
    data = samples()
    data[3]["x"][0, 0] = number
    with pytest.raises(UsageError, match="sample 3: input 'x' holds NaN or infinite numbers"):
        onnxopt.prune(net(), "prune-weights", data=data, bench=False)


STORED = {
    "float16": "agraph (float[N, 16] x) => (float[N, 16] y) { f = Cast<to = 1>(w)  y = MatMul(x, f) }",
    "tied": """agraph (int64[N] x) => (float[N, 16] y) {
        e = Gather(w, x)  a = Relu(e)  t = Transpose<perm = [1, 0]>(w)  y = MatMul(a, t)
    }""",
}


@pytest.mark.parametrize("kind", STORED)
def test_small_weights_are_stored_as_they_were_and_once(kind: str) -> None:
    model = text_model(STORED[kind])
    weight = np.random.default_rng(0).standard_normal((16, 16))
    dtype = np.float16 if kind == "float16" else np.float32
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(dtype), "w"))
    result = onnxopt.prune(model, "prune-weights{small=0,embeddings=true}", bench=False)
    assert result.report.ok
    assert isinstance(result.model, onnx.ModelProto)
    (stored,) = result.model.graph.initializer
    assert numpy_helper.to_array(stored).dtype == dtype
    assert zeros(result.model, stored.name) == 0.5


def test_what_callers_may_override_is_told_with_what_to_do() -> None:
    model = net()
    for one in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(one.name, one.data_type, one.dims))
    kept = onnxopt.prune(model, "prune-channels{multiple=1}", data=samples(), bench=False)
    assert "an input of the graph (overridable; --freeze-initializers folds it)" in kept.report.reason
    cut = onnxopt.prune(
        model, "prune-channels{multiple=1}", data=samples(), bench=False, freeze_initializers=True
    )
    assert cut.report.ok


def test_passes_that_can_use_samples_get_them() -> None:
    dropped = prune(residual(), "drop-layers")
    assert dropped.report.ok
    assert [step.changes for step in dropped.report.searched.best.steps] == [1]
    assert dropped.report.searched.best.judgement.score > 0.95
    fitted = prune(net(), "factorize-weights{energy=0.99,multiple=1}")
    (step,) = fitted.report.searched.best.steps
    assert step.changes == 1  # by the weight alone, 0.99 takes all ranks


def test_what_is_sparse_and_clustered_is_told_as_both(tmp_path: Path) -> None:
    result = prune(net(), "prune-weights{sparsity=0.8,small=0},cluster-weights{bits=4}")
    report = result.report
    assert report.zeros == pytest.approx(0.8, abs=0.01)
    assert {one.weight for one in report.layers} == {"u", "v"}
    assert (
        report.after.bytes < 0.4 * report.before.bytes
    )  # clean-up leaves codebooks alone, small as they are
    assert not any("no smaller as a file" in sentence for sentence in report.savings)
    assert any("of the bytes of tensors are left" in sentence for sentence in report.savings)


def test_a_pack_is_pruned_as_its_model_is(tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="packs need zstandard")
    onnx.save(net(), tmp_path / "net.onnx")
    packed = onnxopt.pack(tmp_path / "net.onnx", tmp_path / "net.onnxpack").packed_bytes
    report = onnxopt.prune(tmp_path / "net.onnxpack", "prune-weights{small=0}", bench=False).report
    assert report.packed is not None
    assert report.packed[0] == packed > report.packed[1]


def test_outputs_without_rows_are_judged_by_sqnr() -> None:
    model = text_model("agraph (float[2, 4, 8, 8] x) => (float[2, 8, 6, 6] y) { y = Conv(x, w) }")
    weight = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    assert "sqnr 150 before" in prune(model, "prune-weights").report.searched.best.judgement.summary
    with pytest.raises(UsageError, match="no output has rows of scores or labels; take sqnr or mse"):
        prune(model, "prune-weights", max_drop=0.1)


def test_what_nothing_can_be_proved_of_is_tidy_all_the_same() -> None:
    model = text_model(
        """agraph (float[1, 2, 8, 8] x) => (float[1, 4, 8, 8] y) <float[4] b = {1, 2, 3, 4}> {
            y = Conv<pads = [1, 1, 1, 1]>(x, w, b)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 2, 3, 3), np.float32), "w"))
    result = prune(model, "shrink-kernels")
    assert [list(one.dims) for one in result.model.graph.initializer] == [[4], [4, 2, 1, 1]]


def test_what_is_carried_to_an_output_of_unknown_shape_stays() -> None:
    model = text_model(
        "agraph (float[4, 2, 16] x) => (float[a, b, c, d] y) { y = LSTM<hidden_size = 8>(x, w, r) }"
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (1, 32, 16)), ("r", (1, 32, 8))):
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    assert "nothing was pruned: prune-channels" in prune(model, "prune-channels{multiple=1}").report.reason


def test_products_of_integers_are_cut_but_not_fitted() -> None:
    model = text_model(
        """agraph (float[N, 16] x) => (int64[N, 4] y) {
            i = Cast<to = 7>(x)  a = MatMul(i, u)  b = Abs(a)  y = MatMul(b, v)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("u", (16, 32)), ("v", (32, 4))):
        model.graph.initializer.append(numpy_helper.from_array(rng.integers(-9, 9, shape), name))
    assert prune(model, "prune-channels{multiple=1}").report is not None


def test_a_weight_of_low_rank_keeps_all_its_energy_in_float32() -> None:
    model = text_model("agraph (float[N, 32] x) => (float[N, 32] y) { y = MatMul(x, w) }")
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((32, 4)) @ rng.standard_normal((4, 32))).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    result = onnxopt.prune(model, "factorize-weights{energy=1.0,multiple=1}", metric="sqnr", bench=False)
    assert result.report.searched.best.judgement.score >= 120
    assert result.report.after.bytes == 2 * 32 * 4 * 4
