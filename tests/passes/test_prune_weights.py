"""Weights pruned where they live: exact counts, kept elements bit-equal, each refusal by its reason."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.graph import walk
from onnxopt.model import load
from onnxopt.passes.prune.prune_weights import PruneWeights
from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.passes.quantize.quantize_weights import QuantizeWeights
from onnxopt.pruning.weights import StoredWeight, find_weights, kept_elements, sparsity
from onnxopt.recipe import parse_pass
from onnxopt.storage import save
from onnxopt.streamed import Streamed
from tests.passes.weighted import LAYERS, layer, weight_of
from tests.support import Rewritten, execute, random_feeds, run_pass, sqnr, text_model

SMALL: dict[str, Any] = {"small": 1, "protect": ()}


def only(model: ir.Model, name: str = "w") -> StoredWeight:
    return next(one for one in find_weights(model) if one.name.startswith(name))


def numbers(done: Rewritten | onnx.ModelProto, name: str = "w") -> np.ndarray:
    one = only(ir.from_proto(done) if isinstance(done, onnx.ModelProto) else done.model, name)
    return one.numbers(one.stored())


def product(
    shape: tuple[int, ...] = (16, 8), seed: int = 0, array: np.ndarray | None = None
) -> onnx.ModelProto:
    model = text_model("agraph (float[3, K] x) => (float[3, N] y) { y = MatMul(x, w) }")
    array = weight_of(shape, seed) if array is None else array
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    return model


def samples_of(model: onnx.ModelProto, count: int = 4) -> list[dict[str, np.ndarray]]:
    return [random_feeds(model, seed, {"K": 16}) for seed in range(count)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(2, 9),
    st.floats(0, 1),
    st.sampled_from(["l1", "l2", "random"]),
    st.integers(0, 9),
)
def test_so_many_elements_go_and_the_rest_stays_bit_equal(
    height: int, width: int, share: float, score: Any, seed: int
) -> None:
    model = product((height, width), seed)
    done = run_pass(model, PruneWeights(share, score=score, **SMALL))
    before, after = numbers(model), numbers(done)
    assert np.count_nonzero(after == 0) == round(share * before.size)
    np.testing.assert_array_equal(after[after != 0], before[after != 0])
    assert not np.signbit(after[after == 0]).any()
    if score != "random" and 0 < (after == 0).sum() < before.size:
        assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()


@pytest.mark.parametrize("store", ["initializer", "node", "transposed", "reshaped", "cast", "identity"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_with_the_pruned_weight_wherever_it_is_stored(name: str, store: str) -> None:
    model = layer(name, store=store)
    done = run_pass(model, PruneWeights(0.75, **SMALL))
    graph = ir.from_proto(model)
    assert done.changes == len(find_weights(graph)) == (2 if "hidden" in LAYERS[name][0] else 1)
    for one in find_weights(graph):
        kept = kept_elements(done.model)[one.name]
        assert kept.sum() == one.size - round(0.75 * one.size)
        one.write(ir.Tensor(np.where(kept, one.stored(), 0).astype(one.stored().dtype)))
    feeds = random_feeds(model)
    for want, have in zip(execute(graph, feeds), execute(done.model, feeds), strict=True):
        np.testing.assert_array_equal(want, have)


@pytest.mark.parametrize("nm", ["2:4", "1:4", "3:5", "1:2"])
@pytest.mark.parametrize(
    ("name", "axis"),
    {
        "Conv1D": 1,
        "Conv2D": 1,
        "ConvTranspose": 0,
        "Gemm": 0,
        "MatMul": 0,
        "MatMul stack": 1,
        "MatMul left": 1,
        "LSTM": 2,
        "GRU": 2,
    }.items(),
)
def test_patterns_run_along_the_axis_that_is_summed_up(name: str, axis: int, nm: str) -> None:
    model = layer(name, store="transposed")
    kept, length = map(int, nm.split(":"))
    done = run_pass(model, PruneWeights(nm=nm, **SMALL))
    before, after = numbers(model).T, numbers(done).T  # as it is multiplied with
    before, after = np.moveaxis(before, axis, -1), np.moveaxis(after, axis, -1)
    if before.shape[-1] < length:
        assert done.declined[0] == (
            f"the weight has {before.shape[-1]} input channels, fewer than the pattern is long"
        )
        return
    for start in range(0, before.shape[-1], length):
        part, left = np.abs(before[..., start : start + length]), after[..., start : start + length] != 0
        assert (left.sum(-1) == min(kept, part.shape[-1])).all()
        if part.shape[-1] > kept:
            assert (np.where(left, part, np.inf).min(-1) >= np.where(left, 0, part).max(-1)).all()


FOUR_AXES = {
    "Conv(x, w)": ((8, 12, 3, 3), (1, 12, 5, 5), (0, 2, 3, 1)),
    "Conv<group = 2>(x, w)": ((8, 6, 3, 3), (1, 12, 5, 5), (0, 2, 3, 1)),
    "Gemm(x, w)": ((12, 8), (3, 12), (1, 0)),
    "Gemm<transB = 1>(x, w)": ((8, 12), (3, 12), (0, 1)),
    "MatMul(x, w)": ((12, 8), (3, 12), (1, 0)),
}
"""Layer -> shapes of its weight and input, and the weight's axes with the input channels last."""


@pytest.mark.parametrize("score", ["l1", "wanda", "obs"])
@pytest.mark.parametrize("call", FOUR_AXES)
def test_two_of_four_is_what_tensorrt_takes(call: str, score: Any) -> None:
    """For each output channel and place of the kernel, of four input channels in a row two are zero."""
    shape, x, order = FOUR_AXES[call]
    dims = ", ".join(["?"] * len(x))
    model = text_model(f"agraph (float{list(x)} x) => (float[{dims}] y) {{ y = {call} }}")
    model.graph.initializer.append(numpy_helper.from_array(weight_of(shape), "w"))
    samples = [random_feeds(model, seed) for seed in range(8)]
    done = run_pass(model, PruneWeights(nm="2:4", score=score, samples=samples, **SMALL))
    rows = numbers(done).transpose(order).reshape(-1, shape[order[-1]])
    for start in range(0, rows.shape[1] // 4 * 4, 4):
        assert (np.count_nonzero(rows[:, start : start + 4], axis=1) == 2).all()


@pytest.mark.parametrize(
    ("name", "axes"),
    [("Conv2D", (1, 2, 3)), ("Gemm", (0,)), ("MatMul left", (1,)), ("LSTM", (2,)), ("in groups", (0, 2, 3))],
)
def test_rows_are_what_an_output_channel_adds_up(name: str, axes: tuple[int, ...]) -> None:
    done = run_pass(layer(name), PruneWeights(0.5, scope="row", **SMALL))
    zeros = (numbers(done) == 0).sum(axes)
    assert (zeros == round(numbers(done).size / zeros.size * 0.5)).all()


def two_layers() -> onnx.ModelProto:
    model = text_model(
        "agraph (float[3, 16] x) => (float[3, 4] y) { z = MatMul(x, a)  r = Relu(z)  y = MatMul(r, b) }"
    )
    for name, array in {"a": weight_of((16, 8)) * 10, "b": weight_of((8, 4), 1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def test_layers_are_compared_with_each_other_or_each_within_itself() -> None:
    def zeros(**how: Any) -> list[int]:
        return [
            one.zeros for one in sparsity(run_pass(two_layers(), PruneWeights(0.25, small=1, **how)).model)
        ]

    assert zeros() == [32, 8]
    assert sum(zeros(scope="global")) == 40
    assert zeros(scope="global")[1] > 25  # its elements are smaller
    assert abs(zeros(scope="global", score="l2")[1] - 8) < 5
    assert sum(zeros(scope="global", score="random")) == 40


def test_what_is_zero_already_counts() -> None:
    array = weight_of((16, 8))
    array[:4] = 0
    done = run_pass(product(array=array), PruneWeights(0.5))
    assert np.count_nonzero(numbers(done)) == 64
    assert run_pass(product(array=array), PruneWeights(0.25)).changes == 0
    random = run_pass(product(array=array), PruneWeights(0.5, score="random"))
    assert np.count_nonzero(numbers(random)) == 64


def test_a_threshold_and_a_percentile() -> None:
    array = (np.arange(100, dtype=np.float32) + 1).reshape(10, 10)
    done = run_pass(product(array=array), PruneWeights(threshold=20))
    assert np.count_nonzero(numbers(done) == 0) == 19
    done = run_pass(product(array=array), PruneWeights(percentile=20, scope="global"))
    assert np.count_nonzero(numbers(done) == 0) == 20
    done = run_pass(product(array=np.minimum(array, 10)), PruneWeights(percentile=50))
    assert np.count_nonzero(numbers(done) == 0) == 9  # the others are all as large as the percentile


def test_scores_of_the_caller_decide() -> None:
    seen = {}

    def score(name: str, array: np.ndarray) -> np.ndarray:
        seen[name] = array
        return -np.arange(array.size).reshape(array.shape)

    done = run_pass(product(), PruneWeights(0.25, saliency=score))
    assert (numbers(done).reshape(-1)[-32:] == 0).all()
    assert list(seen) == ["w"]


def test_masks_are_found_again_and_applied_again() -> None:
    done = run_pass(two_layers(), PruneWeights(0.7, scope="global", small=1))
    masks = kept_elements(done.model)
    again = run_pass(two_layers(), PruneWeights(masks=masks))
    assert again.changes == 2
    for name in ("a", "b"):
        np.testing.assert_array_equal(numbers(done, name), numbers(again, name))
    with pytest.raises(UsageError, match=r"masks: the model has no weight 'c' \(known: a, b\)"):
        run_pass(two_layers(), PruneWeights(masks={"c": masks["a"]}))
    with pytest.raises(
        UsageError, match=r"masks: 'a' has the shape \[16, 8\]; found a mask of shape \[8, 4\]"
    ):
        run_pass(two_layers(), PruneWeights(masks={"a": masks["b"]}))


@pytest.mark.parametrize("score", ["wanda", "obs"])
@pytest.mark.parametrize("name", ["Conv1D", "Conv2D", "Conv3D", "ConvTranspose", "Gemm", "MatMul"])
@pytest.mark.parametrize("nm", ["", "2:4"])
def test_with_samples_the_same_count_goes(name: str, score: Any, nm: str) -> None:
    model = layer(name)
    one = PruneWeights(None if nm else 0.5, nm=nm, score=score, samples=samples_of(model), **SMALL)
    done = run_pass(model, one)
    kept = numbers(done) != 0
    assert done.changes == 1
    assert kept.sum() == kept.size // 2
    if score == "wanda":
        np.testing.assert_array_equal(numbers(done)[kept], numbers(model)[kept])


def correlated(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((4, 16)).astype(np.float32)
    parts = [rng.standard_normal((3, 4)).astype(np.float32) for _ in range(40)]
    return [{"x": part @ mixing + 0.1 * rng.standard_normal((3, 16)).astype(np.float32)} for part in parts]


@pytest.mark.parametrize("nm", ["", "2:4"])
def test_with_samples_the_outputs_stay_closer(nm: str) -> None:
    model = product()
    samples = correlated(model)
    share = None if nm else 0.5

    def quality(**how: Any) -> float:
        done = run_pass(model, PruneWeights(share, nm=nm, **how))
        pairs = [(execute(model, feeds)[0], execute(done.model, feeds)[0]) for feeds in samples]
        return sqnr(np.stack([want for want, _ in pairs]), np.stack([have for _, have in pairs]))

    assert quality(score="obs", samples=samples) > quality() + 5


def test_an_input_that_is_never_used_costs_its_weights_first() -> None:
    model = product()
    samples = [{"x": feeds["x"] * (np.arange(16) < 12).astype(np.float32)} for feeds in samples_of(model, 40)]
    for score in ("wanda", "obs"):
        done = run_pass(model, PruneWeights(0.25, score=score, samples=samples))
        assert (numbers(done)[12:] == 0).all()
        assert (numbers(done)[:12] != 0).all()


@pytest.mark.parametrize("kind", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("scope", ["layer", "global", "row"])
def test_stored_integers_become_their_zero_point(kind: str, scope: Any) -> None:
    model = run_pass(layer("MatMul"), QuantizeWeights(kind, symmetric=False, minimum=1)).model
    before = only(model)
    assert before.levels is not None
    want = before.numbers(before.stored())
    zeros = np.count_nonzero(want == 0)
    one = PruneWeights(0.5, scope=scope, **SMALL)
    done = Rewritten(model, 0, ())
    one(model)
    have = numbers(done)
    assert np.count_nonzero(have == 0) == max(160, zeros)
    np.testing.assert_array_equal(have[have != 0], want[have != 0])
    assert find_weights(model)[0].tensor.dtype == before.tensor.dtype


INTEGERS = {
    "MatMulInteger": (
        "float[3, 16] x",
        "q, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z, p)  y = Cast<to = 1>(i)",
    ),
    "QLinearConv": (
        "uint8[1, 16, 5] q",
        "c = QLinearConv(q, one, zero, w, one, p, one, zero)  y = Cast<to = 1>(c)",
    ),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_operators_on_integers(name: str) -> None:
    x, body = INTEGERS[name]
    model = text_model(
        f"agraph ({x}) => (float[?, ?] y) <float one = {{0.02}}, uint8 zero = {{3}}> {{ {body} }}"
    )
    shape, zeros = ((16, 8), [7] * 8) if "MatMul" in name else ((8, 16, 1), [3, 7] * 4)
    if "Conv" in name:
        model.graph.output[0].type.tensor_type.shape.dim.add()
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    point = np.array(zeros, np.uint8)
    model.graph.initializer.extend([numpy_helper.from_array(array, "w"), numpy_helper.from_array(point, "p")])
    done = run_pass(model, PruneWeights(0.5, scope="row"))
    after = only(done.model).stored()
    spread = point if "MatMul" in name else point[:, None, None]
    gone = after == spread
    assert (gone.sum(0 if "MatMul" in name else (1, 2)) == 8).all()
    np.testing.assert_array_equal(after[~gone], array[~gone])
    compared = run_pass(model, PruneWeights(0.5, scope="global"))
    reason = "the weight has no scale of its own to compare its elements with others by"
    assert compared.declined == ((reason,) if "MatMul" in name else ())


def test_integers_that_a_cast_and_a_product_unpack() -> None:
    model = text_model(
        """agraph (float[3, 16] x) => (float[3, 8] y)
        <float[1, 8] s = {1, 2, 3, 4, 5, 6, 7, 8}, float p = {5}> {
            f = Cast<to = 1>(w)  c = Sub(f, p)  v = Mul(c, s)  y = MatMul(x, v)
        }"""
    )
    array = np.random.default_rng(0).integers(-100, 100, (16, 8)).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    done = run_pass(model, PruneWeights(0.5, scope="global", small=1))
    after, scale = only(done.model).stored(), np.arange(1, 9)
    assert np.count_nonzero(after == 5) == 64
    assert np.abs((array - 5.0) * scale)[after == 5].max() <= np.abs((array - 5.0) * scale)[after != 5].min()


def by_columns(front: str) -> onnx.ModelProto:
    """A product of integers whose second operand q is made of w, with the zero points p of its columns."""
    model = text_model(
        f"""agraph (float[3, 8] x) => (float[3, 8] y) <float one = {{0.1}}, uint8 seven = {{7}}> {{
            {front}  a, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(a, q, z, p)  y = Cast<to = 1>(i)
        }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(np.full(8, 7, np.uint8), "p"))
    return model


def test_floats_that_are_quantized_at_run_time_become_zero() -> None:
    model = by_columns("q = QuantizeLinear(w, one, seven)")
    model.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    after = only(run_pass(model, PruneWeights(0.5, scope="global")).model).stored()
    assert np.count_nonzero(after == 0) == 32
    np.testing.assert_array_equal(after[after != 0], weight_of((8, 8))[after != 0])


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("q = Transpose(w)", "is moved before it is scaled"),
        (
            "f = DequantizeLinear(w, one, seven)  q = QuantizeLinear(f, one, seven)",
            "is scaled more than once",
        ),
    ],
)
def test_integers_whose_zero_points_lie_along_another_axis_stay(front: str, reason: str) -> None:
    model = by_columns(front)
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    assert run_pass(model, PruneWeights(0.5, scope="row")).declined == (f"the weight {reason}",)


@pytest.mark.parametrize("point", [0.5, 300.0, -1.0])
def test_integers_none_of_which_stands_for_zero_stay(point: float) -> None:
    model = text_model(
        f"""agraph (float[3, 8] x) => (float[3, 8] y) <float p = {{{point}}}> {{
            f = Cast<to = 1>(w)  c = Sub(f, p)  y = MatMul(x, c)
        }}"""
    )
    array = np.arange(64, dtype=np.uint8).reshape(8, 8)
    model.graph.initializer.append(numpy_helper.from_array(array, "w"))
    reason = "the weight has a zero point that is no number of its type"
    assert run_pass(model, PruneWeights(0.5)).declined == (reason,)


def test_a_dynamic_lstm_of_integers() -> None:
    model = run_pass(layer("LSTM"), QuantizeDynamic()).model
    names = {one.name: one.shape for one in find_weights(model)}
    assert sorted(names.values()) == [(1, 5, 20), (1, 8, 20)]
    PruneWeights(0.5, scope="row", **SMALL)(model)
    for one in find_weights(model):
        assert (one.zeros(one.stored()).sum(1) == one.shape[1] // 2).all()


BODY = """agraph (float[3, 8] x, bool b) => (float[3, 8] y) {
    y = If (b) <
        then_branch = yes () => (float[3, 8] p) { p = MatMul(x, w) },
        else_branch = no () => (float[3, 8] q) {
            k = Constant<value = float[8, 8] {WEIGHT}>()
            q = MatMul(x, k)
        }
    >
}"""


def test_weights_in_branches_and_functions() -> None:
    words = ", ".join(str(i % 13 - 6.5) for i in range(64))
    model = text_model(BODY.replace("WEIGHT", words))
    model.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    done = run_pass(model, PruneWeights(0.5))
    assert [(one.weight, one.zeros, one.operator) for one in sparsity(done.model)] == [
        ("w", 32, "MatMul"),
        ("k", 32, "MatMul"),
    ]
    text = f"""<ir_version: 10, opset_import: ["": 17, "local": 1]>
    agraph (float[3, 8] x) => (float[3, 8] y) {{ a = local.f(x)  y = local.f(a) }}
    <domain: "local", opset_import: ["": 17]> f (x) => (y)
    {{ w = Constant<value = float[8, 8] {{{words}}}>()  y = MatMul(x, w) }}"""
    done = run_pass(text, PruneWeights(0.5))
    assert [one.zeros for one in sparsity(done.model)] == [32]


@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_branches_that_samples_run_are_looked_at(score: Any) -> None:
    """The third input is never there in the first branch's samples; the second branch has no samples."""
    words = ", ".join(str(i % 13 - 6.5) for i in range(64))
    model = text_model(BODY.replace("WEIGHT", words))
    model.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    seen = (np.arange(8) != 2).astype(np.float32)
    samples = [{"x": feeds["x"] * seen, "b": np.array(True)} for feeds in samples_of(model, 40)]
    done = run_pass(model, PruneWeights(0.125, score=score, samples=samples, **SMALL))
    why = "is no float second factor of a convolution, Gemm or MatMul that samples are known to reach"
    assert done.declined == (f"the weight {why}",)
    assert (numbers(done)[2] == 0).all()
    assert np.count_nonzero(numbers(done)) == 56
    assert np.count_nonzero(only(done.model, "k").stored()) == np.count_nonzero(
        only(ir.from_proto(model), "k").stored()
    )
    both = [*samples, {"x": samples[0]["x"], "b": np.array(False)}]
    done = run_pass(model, PruneWeights(0.5, score=score, samples=both, **SMALL))
    assert [one.zeros for one in sparsity(done.model)] == [32, 32]


def test_a_bias_that_another_branch_reads_stays_there() -> None:
    """obs gives the bias of the first branch, whose weight loses elements, other numbers."""
    model = text_model(
        """agraph (float[3, 8] x, bool b) => (float[3, 8] y) {
            y = If (b) <
                then_branch = yes () => (float[3, 8] p) { p = Gemm(x, w, c) },
                else_branch = no () => (float[3, 8] q) { q = Gemm(x, v, c) }
            >
        }"""
    )
    for name, shape in {"w": (8, 8), "v": (8, 8), "c": (8,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(weight_of(shape), name))
    samples = [{"x": 1 + feeds["x"], "b": np.array(True)} for feeds in samples_of(model, 40)]
    done = run_pass(model, PruneWeights(0.5, score="obs", samples=samples))
    assert done.changes == 1
    other = {**samples[0], "b": np.array(False)}
    np.testing.assert_array_equal(execute(done.model, other)[0], execute(model, other)[0])
    want, have = (
        np.mean([execute(one, feeds)[0].mean(0) for feeds in samples], 0) for one in (model, done.model)
    )
    np.testing.assert_allclose(have, want, atol=1e-5)


def test_a_shared_weight_is_pruned_once() -> None:
    model = text_model(
        """agraph (float[3, 8] x) => (float[3, 8] y) {
            z = MatMul(x, w)  t = Transpose(w)  y = Gemm<transB = 1>(z, t)
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    assert run_pass(model, PruneWeights(0.5)).changes == 1
    assert run_pass(model, PruneWeights(nm="2:4")).changes == 1  # both add up its first axis
    other = text_model(
        "agraph (float[3, 8] x) => (float[3, 8] y) { z = MatMul(x, w)  y = Gemm<transB = 1>(z, w) }"
    )
    other.graph.initializer.append(numpy_helper.from_array(weight_of((8, 8)), "w"))
    assert run_pass(other, PruneWeights(nm="2:4")).declined == (
        "the weight is added up along different axes",
    )
    obs = PruneWeights(score="obs", samples=[{"x": weight_of((3, 8))}])
    assert run_pass(other, obs).declined == (
        "the weight is read more than once, and obs makes up for one reader's loss",
    )


def test_weights_of_one_name_in_two_branches_are_told_apart() -> None:
    text = (
        BODY.replace("MatMul(x, w)", "MatMul(x, w)")
        .replace("k = Const", "w = Const")
        .replace("(x, k)", "(x, w)")
    )
    text = text.replace("{ p =", "{ w = Constant<value = float[8, 8] {WEIGHT}>() p =")
    model = text_model(text.replace("WEIGHT", ", ".join(str(i) for i in range(64))))
    assert [one.name for one in find_weights(ir.from_proto(model))] == ["w", "w#2"]


CHAIN = """agraph (float[1, 4, 9] x) => (float[1, 4, 9] y) {
    a = Conv(x, u)
    b = Conv<group = 4>(a, v)
    c = Conv(b, w)
    d = Add(a, c)
    y = Conv(d, t)
}"""


@pytest.mark.parametrize(
    ("protect", "pruned"),
    [
        ((), "tuvw"),
        (("depthwise",), "tuw"),
        (("first",), "tvw"),
        (("last",), "uvw"),
        (("first", "last", "depthwise"), "w"),
    ],
)
def test_layers_that_are_protected(protect: Any, pruned: str) -> None:
    model = text_model(CHAIN)
    for name, shape in {"u": (4, 4, 1), "v": (4, 1, 1), "w": (4, 4, 1), "t": (4, 4, 1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(weight_of(shape), name))
    done = run_pass(model, PruneWeights(0.5, protect=protect, small=1))
    assert "".join(sorted(one.weight for one in sparsity(done.model) if one.zeros)) == pruned
    assert run_pass(model, PruneWeights(0.5)).declined.count("the weight has fewer than 64 elements") == 4
    kept = run_pass(model, PruneWeights(0.5, protect=protect, small=1, keep=("d", "b")))
    assert "v" not in [one.weight for one in sparsity(kept.model) if one.zeros]


def _overridable(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [16, 8]))


def _read_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Neg", ["w"], ["n"]))
    model.graph.output.append(helper.make_tensor_value_info("n", 1, [16, 8]))


def _given_out(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("w", 1, [16, 8]))


def _embedding(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Gather", ["w", "i"], ["n"]))
    model.graph.input.append(helper.make_tensor_value_info("i", 7, [2]))
    model.graph.output.append(helper.make_tensor_value_info("n", 1, [2, 8]))


def _infinite(model: onnx.ModelProto) -> None:
    array = weight_of((16, 8))
    array[0, 0] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_overridable, "is a graph input (overridable; --freeze-initializers folds it)"),
        (_read_elsewhere, "is also read by Neg"),
        (_given_out, "is a graph output, too"),
        (_embedding, "is an embedding"),
        (_infinite, "is not finite"),
    ],
)
def test_weights_that_stay_say_why(change: Any, reason: str) -> None:
    model = product()
    change(model)
    done = run_pass(model, PruneWeights())
    assert (done.changes, done.declined) == (0, (f"the weight {reason}",))
    if change is _embedding:
        assert run_pass(model, PruneWeights(embeddings=True)).changes == 1


def test_what_wanda_and_obs_do_not_see_stays() -> None:
    for name in ("LSTM", "MatMul left"):
        model = layer(name)
        done = run_pass(model, PruneWeights(score="wanda", samples=samples_of(model), **SMALL))
        why = "is no float second factor of a convolution, Gemm or MatMul that samples are known to reach"
        assert set(done.declined) == {f"the weight {why}"}
    model = product((2050, 1))
    one = PruneWeights(score="obs", samples=[{"x": np.ones((3, 2050), np.float32)}])
    assert run_pass(model, one).declined == ("the weight adds up 2050 summands, more than 2048",)
    wanda = PruneWeights(score="wanda", samples=[{"x": np.ones((3, 2050), np.float32)}])
    assert np.count_nonzero(numbers(run_pass(model, wanda))) == 1025


def test_biases_and_norms_are_no_weights() -> None:
    model = text_model(
        """agraph (float[3, 16] x) => (float[3, 8] y) {
            n = LayerNormalization(x, g, h)  y = Gemm(n, w, c)
        }"""
    )
    for name, shape in {"g": (16,), "h": (16,), "w": (16, 8), "c": (8,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(weight_of(shape), name))
    assert [one.weight for one in sparsity(ir.from_proto(model))] == ["w"]
    done = run_pass(model, PruneWeights(small=1))
    assert [one.share for one in sparsity(done.model)] == [0.5]


def test_names_types_and_order_stay() -> None:
    model = two_layers()
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16), "a")
    )
    model.graph.node[0].input[1] = "f"
    model.graph.node.insert(0, helper.make_node("Cast", ["a"], ["f"], to=1))
    done = run_pass(model, PruneWeights(small=1))
    held = done.model.graph.initializers
    assert [(name, value.dtype) for name, value in held.items()] == [
        ("a", ir.DataType.FLOAT16),
        ("b", ir.DataType.FLOAT),
    ]
    assert len(list(walk(done.model.graph))) == len(model.graph.node)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("sparsity=1.5", "sparsity is 1.5; expected 0 to 1"),
        ("percentile=-1", "percentile is -1.0; expected 0 to 100"),
        ("nm=4", "nm is '4'; expected such as 2:4, two that stay of four"),
        ("nm=4:4", "nm is '4:4'; expected such as 2:4, two that stay of four"),
        ("sparsity=0.5,nm=2:4", "sparsity and nm both say how much: give one of them"),
        ("threshold=0.1,score=l2", "threshold is one of magnitudes: it takes score=l1, and no rows"),
        ("score=obs,scope=global", "obs compares within a layer; found scope=global"),
        ("nm=2:4,scope=row", "nm compares within its pattern; found scope=row"),
        ("scope=all", "scope: unknown value 'all'"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=r"^prune-weights: ") as error:
        parse_pass(f"prune-weights{{{text}}}")
    assert problem in str(error.value)


def test_wanda_without_samples_is_refused() -> None:
    with pytest.raises(
        UsageError, match="prune-weights: wanda looks at what weights are multiplied with: give samples"
    ):
        run_pass(product(), PruneWeights(score="wanda"))


def test_a_recipe_spells_all_but_data() -> None:
    one = PruneWeights(0.9, scope="global", protect=("first", "last"), keep=("head*",), samples=[{}])
    assert str(one) == "prune-weights{sparsity=0.9,scope=global,protect=first+last,keep=head*}"
    assert parse_pass(str(one)) == one
    assert parse_pass("prune-weights{protect=}") == PruneWeights(protect=())


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("scope", ["layer", "global", "row"])
def test_large_weights_of_files_are_pruned_when_they_are_written(
    tmp_path: Path, scope: Any, score: Any
) -> None:
    array = weight_of((1500, 1000))
    save(ir.from_proto(product(array=array)), tmp_path / "in.onnx", external_data=True)
    model = load(tmp_path / "in.onnx")
    one = PruneWeights(0.75, scope=scope, score=score)
    one(model)
    assert isinstance(model.graph.initializers["w"].const_value, Streamed)
    save(model, tmp_path / "out.onnx")
    want = numbers(run_pass(product(array=array), one))
    have = only(load(tmp_path / "out.onnx")).stored()
    assert np.count_nonzero(have == 0) == 1_125_000
    np.testing.assert_array_equal(have, want)


def test_scores_in_parts_take_a_fraction_of_the_memory_of_the_weight(tmp_path: Path) -> None:
    save(ir.from_proto(product(array=weight_of((4000, 2500)))), tmp_path / "in.onnx", external_data=True)
    for score in ("l1", "l2"):
        model = load(tmp_path / "in.onnx")
        tracemalloc.start()
        PruneWeights(0.75, scope="global", score=score)(model)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.5 * 4 * 10_000_000, score


def test_few_samples_leave_obs_no_worse_than_magnitude() -> None:
    """On 12 positions of 16 summands moments are singular: what makes up for them alone helps no others."""
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((16, 16))
    weight = weight_of((16, 32))
    model = text_model("agraph (float[N, 16] x) => (float[N, 32] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    few = [{"x": (rng.standard_normal((3, 16)) @ mixed).astype(np.float32)} for _ in range(4)]
    others = (rng.standard_normal((500, 16)) @ mixed).astype(np.float32)
    lost = {}
    for one in (PruneWeights(0.5), PruneWeights(0.5, score="obs", samples=few)):
        (pruned,) = run_pass(model, one).model.graph.initializers.values()
        assert pruned.const_value is not None
        lost[one.score] = float(np.square(others @ (pruned.const_value.numpy() - weight)).sum())
    assert lost["obs"] < lost["l1"]
