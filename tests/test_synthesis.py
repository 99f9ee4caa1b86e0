"""Synthetic feeds: valid for the graph, telling, consistent between inputs, the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.data import synthesize
from onnxopt.errors import UsageError
from onnxopt.model import load
from onnxopt.runtimes import open_session
from onnxopt.synthesis.clues import clues_of

HEADER = '<ir_version: 8, opset_import: ["": 17, "local": 1]>'
MODELS = Path(__file__).parents[2] / "shared" / "models"


def graph(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX's text form, with `weights` as initializers."""
    model = onnx.parser.parse_model(f"{HEADER} {text}")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def table(rows: int, columns: int = 3) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


def runs(model: onnx.ModelProto, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The outputs of each sample at the runtime's lowest level; raises where one does not run."""
    with open_session(model, level="none") as session:
        return [session.run(feed) for feed in feeds]


def shapes(feeds: Sequence[Mapping[str, np.ndarray]], name: str) -> list[tuple[int, ...]]:
    return [feed[name].shape for feed in feeds]


def test_indices_stay_in_the_smallest_table_that_they_reach_through_casts_and_slices() -> None:
    model = graph(
        """g (float[n, 6] x) => (float[a, b, c] y, float[d, e] z) {
            i = Cast<to = 7>(x)
            y = Gather(big, i)
            parts = Slice(i, zero, one, one)
            one_more = Add(parts, three)
            flat = Reshape(one_more, minus)
            z = Gather(small, flat)
        }""",
        big=table(50),
        small=table(9),
        zero=np.array([0]),
        one=np.array([1]),
        three=np.array(3),
        minus=np.array([-1]),
    )
    feeds = synthesize(model, samples=6)
    values = np.concatenate([feed["x"].ravel() for feed in feeds])
    assert feeds[0]["x"].dtype == np.float32
    assert values.min() >= 0
    assert values.max() == 9 - 1 - 3
    assert np.array_equal(values, np.round(values))
    assert len(runs(model, feeds)) == 6


def test_indices_are_bounded_inside_bodies_and_functions() -> None:
    model = onnx.parser.parse_model(
        f"""{HEADER}
        g (int64[n] i, int64[n] j, bool c) => (float[n, 3] y, float[n, 3] z)
        <float[4, 3] t = {{0,1,2,3,4,5,6,7,8,9,10,11}}, float[5, 1] u = {{0,1,2,3,4}}>
        {{
            y = If(c) <
                then_branch = a () => (float[n, 3] p) {{ p = Gather(t, i) }},
                else_branch = b () => (float[n, 3] q) {{ r = Gather(t, i) q = Neg(r) }}
            >
            w = local.look(u, j)
            z = Expand(w, s)
        }}
        <domain: "local", opset_import: ["": 17]>
        look (data, index) => (out) {{ k = Identity(index) out = Gather(data, k) }}"""
    )
    del model.graph.output[1]
    expand = model.graph.node.pop()
    model.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, ["n", 1]))
    assert expand.op_type == "Expand"
    feeds = synthesize(model, samples=6)
    assert max(int(feed["i"].max()) for feed in feeds) == 3
    assert max(int(feed["j"].max()) for feed in feeds) == 4
    assert {bool(feed["c"]) for feed in feeds} == {True, False}
    assert len(runs(model, feeds)) == 6


def test_an_index_into_a_dynamic_axis_follows_its_size() -> None:
    model = graph(
        "g (float[batch, length, 4] x, int64[batch] at) => (float[batch, 4] y)"
        "{ k = Unsqueeze(at, last) y = GatherND<batch_dims = 1>(x, k) }",
        last=np.array([1]),
    )
    assert len(runs(model, synthesize(model))) == 4
    direct = graph("g (float[length, 4] x, int64[k] at) => (float[k, 4] y) { y = Gather<axis = 0>(x, at) }")
    feeds = synthesize(direct, samples=8)
    largest = [int(feed["at"].max()) for feed in feeds]
    assert all(top < len(feed["x"]) for top, feed in zip(largest, feeds, strict=True))
    assert max(largest) > 4


def test_one_hot_depth_bounds_its_indices() -> None:
    model = graph(
        "g (int32[n, 8] x) => (float[n, 8, 5] y) { y = OneHot(x, depth, values) }",
        depth=np.array(5),
        values=np.array([0, 1], np.float32),
    )
    feeds = synthesize(model)
    assert {int(value) for feed in feeds for value in feed["x"].ravel()} == set(range(5))


def test_inputs_that_share_a_symbol_share_its_size_and_samples_differ_in_it() -> None:
    model = graph(
        "g (float[batch, length, 4] x, float[batch, length, 4] y) => (float[batch, length, 4] z)"
        "{ z = Add(x, y) }"
    )
    feeds = synthesize(model)
    assert shapes(feeds, "x") == shapes(feeds, "y")
    assert {shape[0] for shape in shapes(feeds, "x")} == {1, 2}
    assert len({shape[1] for shape in shapes(feeds, "x")}) == 2


def test_question_marks_are_no_shared_symbol() -> None:
    model = graph("g (float[n, 7] x) => (float[n, 3] y) { y = MatMul(x, w) }", w=table(7))
    axis = model.graph.input[0].type.tensor_type.shape.dim
    axis[0].dim_param = axis[1].dim_param = "?"
    feeds = synthesize(model)
    assert shapes(feeds, "x") == [(1, 7), (2, 7), (1, 7), (2, 7)]


def test_axes_of_one_input_take_different_sizes_where_the_graph_allows() -> None:
    model = graph(
        "g (float[n, 3, h, w] x) => (float[n, 3, w, h] y) { y = Transpose<perm = [0, 1, 3, 2]>(x) }"
    )
    assert any(shape[2] != shape[3] for shape in shapes(synthesize(model), "x"))


@pytest.mark.parametrize(
    ("body", "weights", "shape", "expected"),
    [
        ("y = MatMul(x, w)", {"w": table(37)}, "a, b", (None, 37)),
        ("t = Relu(x) y = MatMul(t, w)", {"w": table(37)}, "a, b, c", (None, None, 37)),
        ("y = Gemm<transB = 1>(x, w)", {"w": table(3, 41)}, "a, b", (None, 41)),
        ("y = Conv(x, w)", {"w": np.ones((2, 5, 3, 3), np.float32)}, "a, b, c, d", (None, 5, None, None)),
        ("f = Flatten(x) y = Gemm(f, w)", {"w": table(3 * 29 * 29)}, "a, 3, c, d", (None, 3, 29, 29)),
        ("f = Flatten(x) y = Gemm(f, w)", {"w": table(11 * 13)}, "a, 11, c", (None, 11, 13)),
        ("y = Reshape(x, s)", {"s": np.array([-1, 23, 19])}, "a, b", (None, 437)),
    ],
)
def test_probing_finds_the_sizes_that_weights_require(
    body: str, weights: dict[str, np.ndarray], shape: str, expected: tuple[int | None, ...]
) -> None:
    model = graph(f"g (float[{shape}] x) => (float y) {{ {body} }}", **weights)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = synthesize(model)
    for found in shapes(feeds, "x"):
        assert all(want is None or size % want == 0 for size, want in zip(found, expected, strict=True))
    assert len(runs(model, feeds)) == 4


def test_past_and_new_positions_add_up_to_the_mask() -> None:
    text = """g (float[batch, past, 8] cache, float[batch, new, 8] x, int64[batch, total] attention_mask)
        => (float[batch, total, 8] y) {
            all = Concat<axis = 1>(cache, x)
            m = Cast<to = 1>(attention_mask)
            k = Unsqueeze(m, last)
            y = Mul(all, k)
        }"""
    for total in ("total", "past + new"):
        model = graph(text, last=np.array([2]))
        for value in (model.graph.input[2], model.graph.output[0]):
            value.type.tensor_type.shape.dim[1].dim_param = total
        feeds = synthesize(model)
        assert all(f["attention_mask"].shape[1] == f["cache"].shape[1] + f["x"].shape[1] for f in feeds)
        assert len(set(shapes(feeds, "x"))) == 2


MASKS = [
    ("int64", "attention", "f = Cast<to = 1>(attention) n = Sub(one, f) y = Mul(n, big)"),
    ("int32", "keep", "b = Cast<to = 9>(keep) y = Where(b, one, big)"),
    ("float", "attention_mask", "y = Mul(attention_mask, big)"),
    ("bool", "padding", "n = Not(padding) y = Where(n, big, one)"),
    ("int64", "valid", "b = Equal(valid, zero) y = Where(b, big, one)"),
]


@pytest.mark.parametrize(("dtype", "name", "body"), MASKS)
def test_masks_are_mostly_ones_and_never_all_zero(dtype: str, name: str, body: str) -> None:
    model = graph(
        f"g ({dtype}[batch, length] {name}) => (float[batch, length] y) {{ {body} }}",
        one=np.array(1, np.float32),
        big=np.array(-10000, np.float32),
        zero=np.array(0),
    )
    feeds = synthesize(model)
    for feed in feeds:
        mask = feed[name].astype(np.int64)
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.any(axis=-1).all()
        assert mask.mean() >= 0.5
        assert (np.diff(mask, axis=-1) <= 0).all()
    assert any((feed[name] == 0).any() for feed in feeds)


SAMPLE_RATE = """g (float[n, ?] x, int64 sr) => (float[n, 3] y) {
    low = Equal(sr, eight)
    y = If(low) <
        then_branch = a () => (float[n, 3] p) { p = MatMul(x, w8) },
        else_branch = b () => (float[n, 3] q) {
            high = Equal(sr, sixteen)
            q = If(high) <
                then_branch = c () => (float[n, 3] r) { r = MatMul(x, w16) },
                else_branch = d () => (float[n, 3] s) { s = MatMul(x, never) }
            >
        }
    >
}"""


def test_a_scalar_takes_each_constant_it_is_compared_with_and_sizes_follow() -> None:
    model = graph(
        SAMPLE_RATE.replace("?", "m"),
        eight=np.array(8000),
        sixteen=np.array(16000),
        w8=table(288),
        w16=table(576),
        never=np.ones((0, 3), np.float32),
    )
    feeds = synthesize(model)
    found = {(int(feed["sr"]), feed["x"].shape[1]) for feed in feeds}
    assert found == {(8000, 288), (16000, 576)}
    assert {feed["x"].shape[0] for feed in feeds} == {1, 2}
    assert len(runs(model, feeds)) == 4


def test_numbers_that_steer_operators_are_small_and_positive() -> None:
    model = graph(
        """g (float[4, 6] x, int64[1] k, int64 limit, int64[2] target, int64 trips)
            => (float[a, b] v, int64[c, d] i, int64[e] r, float[f, h] s, float[4, 6] out) {
            v, i = TopK(x, k)
            r = Range(zero, limit, one)
            s = Reshape(x, target)
            out = Loop(trips, yes, x) <
                body = l (int64 it, bool c0, float[4, 6] acc) => (bool c1, float[4, 6] acc1) {
                    c1 = Identity(c0) acc1 = Add(acc, x)
                }
            >
        }""",
        zero=np.array(0),
        one=np.array(1),
        yes=np.array(True),
    )
    for feed, outputs in zip(feeds := synthesize(model), runs(model, feeds), strict=True):
        assert feed["k"].item() == 1
        assert 1 <= feed["trips"].item() <= 3
        assert len(outputs["r"]) == feed["limit"].item() >= 2
        assert outputs["s"].size == 24


def test_what_goes_into_a_root_or_a_logarithm_is_positive() -> None:
    model = graph("g (float[64] x, float[64] z) => (float[64] y) { a = Log(x) b = Mul(z, z) y = Add(a, b) }")
    feeds = synthesize(model)
    assert all((feed["x"] > 0).all() for feed in feeds)
    assert any((feed["z"] < 0).any() for feed in feeds)
    assert all(np.isfinite(out["y"]).all() for out in runs(model, feeds))


def test_integers_that_nothing_limits_are_negative_once_where_the_model_takes_that() -> None:
    free = graph(
        "g (int64[n, 8] x, uint32[n] u) => (int64[n, 8] y, uint32[n] v) { y = Abs(x) v = Identity(u) }"
    )
    lowest = [feed["x"].min() < 0 for feed in synthesize(free)]
    assert lowest == [False, False, False, True]
    sizes = graph("g (int64[2] x) => (float[a, b] y) { n = Neg(x) s = Neg(n) y = ConstantOfShape(s) }")
    assert len(runs(sizes, synthesize(sizes))) == 4
    root = graph("g (int64[8] x) => (float[8] y) { f = Cast<to = 1>(x) y = Sqrt(f) }")
    for model in (sizes, root):
        assert all((feed["x"] >= 0).all() for feed in synthesize(model))


@pytest.mark.parametrize("dtype", ["float16", "double", "uint8", "int8", "string", "bool"])
def test_each_dtype_is_kept(dtype: str) -> None:
    model = graph(f"g ({dtype}[n, 5] x) => ({dtype}[n, 5] y) {{ y = Identity(x) }}")
    feeds = synthesize(model)
    expected = {"double": "float64", "string": "object"}.get(dtype, dtype)
    assert {feed["x"].dtype.name for feed in feeds} == {expected}
    for feed, outputs in zip(feeds, runs(model, feeds), strict=True):
        assert np.array_equal(feed["x"], outputs["y"])


def test_bfloat16_is_kept() -> None:
    model = graph("g (bfloat16[n, 5] x) => (float[n, 5] y) { y = Cast<to = 1>(x) }")
    feeds = synthesize(model)
    assert {feed["x"].dtype.name for feed in feeds} == {"bfloat16"}
    assert np.array_equal(feeds[0]["x"].astype(np.float32), runs(model, feeds)[0]["y"])


def test_the_seed_decides_and_other_inputs_do_not_disturb() -> None:
    one = graph("g (float[n, 5] x) => (float[n, 5] y) { y = Neg(x) }")
    two = graph("g (float[n, 5] u, float[n, 5] x) => (float[n, 5] y) { y = Add(x, u) }")
    first, again, other = synthesize(one), synthesize(one), synthesize(one, seed=1)
    both = synthesize(two)
    for a, b, c, d in zip(first, again, other, both, strict=True):
        assert np.array_equal(a["x"], b["x"])
        assert not np.array_equal(a["x"], c["x"])
        assert np.array_equal(a["x"], d["x"])
    assert not np.array_equal(both[0]["x"], both[0]["u"])


def test_samples_differ_in_scale() -> None:
    model = graph("g (float[2000] x) => (float[2000] y) { y = Neg(x) }")
    normal, uniform, wide = (feed["x"] for feed in synthesize(model, samples=3))
    assert abs(normal.std() - 1) < 0.1
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert abs(wide.std() - 3) < 0.3


def test_initializers_that_are_inputs_are_left_to_their_default() -> None:
    model = graph(
        "g (float[2, 3] x, float[3] k) => (float[2, 3] y) { y = Add(x, k) }", k=np.ones(3, np.float32)
    )
    assert [list(feed) for feed in synthesize(model)] == [["x"]] * 4


def test_shapes_are_taken_and_bind_their_symbols() -> None:
    model = graph("g (float[b, l, 4] x, float[b, l] m) => (float[b, l, 4] y) { y = Relu(x) }")
    feeds = synthesize(model, shapes={"x": (3, 7, 4)})
    assert shapes(feeds, "x") == [(3, 7, 4)] * 4
    assert shapes(feeds, "m") == [(3, 7)] * 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": (3, 7)}, r"'x' is declared as b x l x 4, not 3 x 7"),
        ({"x": (3, 7, 5)}, r"'x' is declared as b x l x 4, not 3 x 7 x 5"),
        ({"x": (3, 7, 4), "m": (2, 7)}, r"axis 'b' of input 'm' is given as 3 and as 2"),
        ({"xx": (1,)}, r"no input 'xx' to feed \(did you mean 'x'\?\)"),
    ],
)
def test_shapes_that_contradict_the_model_are_refused(
    given: dict[str, tuple[int, ...]], message: str
) -> None:
    model = graph("g (float[b, l, 4] x, float[b, l] m) => (float[b, l, 4] y) { y = Relu(x) }")
    with pytest.raises(UsageError, match=message):
        synthesize(model, shapes=given)


def test_a_model_that_takes_no_guess_says_so_with_the_runtimes_words() -> None:
    model = graph(
        "g (float[n, m] x) => (float[n, 3] y) { c = Concat<axis = 0>(x, x) y = Gemm(c, w, bias) }",
        w=table(7),
        bias=np.ones((9, 3), np.float32),
    )
    with pytest.raises(UsageError, match=r"no valid synthetic input found for x \(n x m\): .*Gemm.*--shape"):
        synthesize(model)


def test_inputs_no_array_can_feed_are_refused() -> None:
    sequence = graph("g (seq(float[n]) x) => (float[m] y) { y = ConcatFromSequence<axis = 0>(x) }")
    with pytest.raises(UsageError, match=r"input 'x' is .*only tensors can be fed"):
        synthesize(sequence)
    shapeless = graph("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    shapeless.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match=r"input 'x' declares no shape.*--shape x="):
        synthesize(shapeless)
    assert shapes(synthesize(shapeless, shapes={"x": (4,)}), "x") == [(4,)] * 4


def test_a_model_that_the_runtime_cannot_open_gets_the_best_guess() -> None:
    model = graph("g (float[batch, 6] x, int64[batch] i) => (float[batch, 6] y) { y = local.Unknown(x, i) }")
    feeds = synthesize(model)
    assert [feed["x"].shape[1] for feed in feeds] == [6] * 4
    assert [len(feed["i"]) for feed in feeds] == [len(feed["x"]) for feed in feeds]


def test_sizes_stay_moderate_but_declared_ones_are_kept() -> None:
    free = graph("g (float[n, a, b, c, d] x) => (float[n, a, b, c, d] y) { y = Relu(x) }")
    assert max(feed["x"].size for feed in synthesize(free)) <= 1 << 22
    fixed = graph("g (float[n, 5000000] x) => (float[n, 5000000] y) { y = Relu(x) }")
    assert shapes(synthesize(fixed, samples=2), "x") == [(1, 5000000), (2, 5000000)]


def test_a_model_without_inputs_gets_empty_feeds() -> None:
    model = graph("g () => (float[2] y) { y = Constant<value = float[2] {1, 2}>() }")
    assert synthesize(model, samples=2) == [{}, {}]


def test_clues_see_through_an_embedding_whose_table_is_computed() -> None:
    model = graph(
        "g (int64[n] i) => (float[n, 3] y) { f = Cast<to = 1>(t) d = Mul(f, s) y = Gather(d, i) }",
        t=np.ones((17, 3), np.int8),
        s=np.array(0.5, np.float32),
    )
    assert [limit.size for limit in clues_of(load(model))["i"].limits] == [17]


@pytest.mark.skipif(not (MODELS / "INDEX.json").exists(), reason="the shared real models are not here")
def test_real_models_run_and_no_output_stays_the_same() -> None:
    index = json.loads((MODELS / "INDEX.json").read_text())["models"]
    usable = [MODELS / entry["file"] for entry in index if entry["name"] != "super_resolution_ir1"]
    for path in usable:
        feeds = synthesize(path)
        with open_session(path, level="none") as session:
            first, *others = (session.run(feed) for feed in feeds)
        for name, array in first.items():
            assert array.size, (path.name, name)
            assert np.isfinite(array).all(), (path.name, name)
            assert not all(np.array_equal(array, other[name]) for other in others), (path.name, name)
    assert len(usable) >= 23
