"""fuse-attention against the runtime, in the spellings of exporters."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from models.attention import JOINS, MASKS, SCALES, SPLITS, attention
from onnxopt.passes.fuse.fuse_attention import FuseAttention
from onnxopt.protobuf import dump
from tests.support import Feeds, Rewritten, assert_equivalent, random_feeds, run_pass, text_model

SIZES = {"batch": 2, "sequence": 5}
Sizes = tuple[int | str, int | str]
NOT_NAN = "rows may be masked whole by -inf, which gives zeros, and NaN in the contrib op"
LOWEST = np.finfo(np.float32).min


def feeds_of(model: onnx.ModelProto, *, seed: int = 0) -> Feeds:
    """Random; in each mask rows that are masked whole."""
    feeds = random_feeds(model, seed, SIZES)
    for name in ("mask", "keep", "drop"):
        if name in feeds and feeds[name].dtype.kind != "f":
            feeds[name][0, ...] = name == "drop"
            feeds[name][1:, ..., 0] = name != "drop"
        elif name in feeds and feeds[name].ndim:
            flat = feeds[name].reshape(-1, feeds[name].shape[-1])
            flat[:3] = np.array([[-np.inf], [LOWEST], [np.inf]], flat.dtype)[: len(flat)]
            flat[3:4, 1:] = -np.inf
            flat[4:5, :1] = -np.inf
    return feeds


def made(*spelling: str, **options: Any) -> onnx.ModelProto:
    """The model, with types and shapes on record."""
    return onnx.shape_inference.infer_shapes(attention(*spelling, **options), data_prop=True)


def fused(model: onnx.ModelProto, *, contrib: bool = False) -> Rewritten:
    return run_pass(model, FuseAttention(contrib=contrib))


def check(model: onnx.ModelProto, done: Rewritten, op_type: str = "Attention") -> None:
    """One fused op is left of the scores, and the numbers stay."""
    assert (done.count(op_type), done.count("Softmax"), done.declined) == (1, 0, ())
    assert_equivalent(model, done.model, feeds_of(model), kind="reorder")


@pytest.mark.parametrize(
    ("split", "scale", "contrib"),
    [(split, scale, False) for split in SPLITS for scale in SCALES]
    + [(split, "both", True) for split in SPLITS],
)
def test_splits_and_scales(split: str, scale: str, contrib: bool) -> None:
    if scale == "before" and split in ("gather", "slice", "split", "apart"):
        scale = "queries"
    sizes: Sizes = ("batch", 5) if split == "rows" else ("batch", "sequence")
    model = made(split, scale, opset=17 if contrib else 23, sizes=sizes)
    done = fused(model, contrib=contrib)
    check(model, done, "MultiHeadAttention" if contrib else "Attention")
    assert done.count("Transpose") == (split == "apart")
    assert done.count("Div") + done.count("Mul") == 0


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask])
@pytest.mark.parametrize("split", ["twice", "batched"])
def test_masks(split: str, mask: str, contrib: bool, guard: bool) -> None:
    """A row that is masked whole comes out the same, or the mask is declined."""
    sizes = (2, 5) if mask == "causal" else ("batch", "sequence")
    model = made(split, "mul", mask, guard=guard, opset=17 if contrib else 23, sizes=sizes)
    done = fused(model, contrib=contrib)
    if contrib and guard and mask in ("infinite", "input", "product"):
        assert (done.changes, done.declined) == (0, (NOT_NAN,))
    else:
        check(model, done, "MultiHeadAttention" if contrib else "Attention")


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("sizes", [("batch", "sequence"), (2, 5), (1, 1), ("batch", 1)])
@pytest.mark.parametrize("join", JOINS)
def test_joins(join: str, sizes: tuple[int | str, int | str], contrib: bool) -> None:
    model = made("transposed", "div", "bias", join, opset=17 if contrib else 23, sizes=sizes)
    done = fused(model, contrib=contrib)
    check(model, done, "MultiHeadAttention" if contrib else "Attention")


@pytest.mark.parametrize("contrib", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("split", ["twice", "flattened"])
def test_heads_that_serve_several_queries(split: str, kv_heads: int, contrib: bool) -> None:
    model = made(split, "div", "bias", heads=4, kv_heads=kv_heads, opset=17 if contrib else 23)
    done = fused(model, contrib=contrib)
    check(model, done, "MultiHeadAttention" if contrib else "Attention")
    if not contrib:
        assert done.count("Expand") == 1  # of the mask
        node = next(node for node in done.model.graph if node.op_type == "Attention")
        assert node.attributes["kv_num_heads"].as_int() == kv_heads


def core(
    nodes: str, *, inputs: str = "", opset: int = 23, sizes: tuple[int, int] = (4, 6), dtype: str = "float"
) -> onnx.ModelProto:
    """q, k (turned) and v as inputs, `nodes` between them and y."""
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        agraph ({dtype}[2,3,5,{sizes[0]}] q, {dtype}[2,3,{sizes[0]},7] k, {dtype}[2,3,7,{sizes[1]}] v{inputs})
            => ({dtype}[2,3,5,{sizes[1]}] y)
        <float half = {{0.5}}, float minus = {{-0.5}}, float zero = {{0}}, float low = {{-5}},
         float[3,1,1] each = {{1,2,3}}>
        {{ {nodes} }}"""
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


PLAIN = "s = MatMul (q, k) w = Softmax <axis = -1> (s) y = MatMul (w, v)"
ADDED = "s = MatMul (q, k) t = Mul (half, s) m = Add (t, mask) w = Softmax (m) y = MatMul (w, v)"


@pytest.mark.parametrize("mask", ["5,7", "3,5,7", "1,1,1,7", "2,3,5,1", "7", "2,1,5,1", "1,3,5,7"])
@pytest.mark.parametrize("contrib", [False, True])
def test_masks_of_any_shape_that_fits(mask: str, contrib: bool) -> None:
    model = core(ADDED, inputs=f", float[{mask}] mask", sizes=(4, 4))
    done = fused(model, contrib=contrib)
    check(model, done, "MultiHeadAttention" if contrib else "Attention")


@pytest.mark.parametrize("size", [1, 5])
def test_a_mask_whose_size_is_that_of_the_scores_or_one(size: int) -> None:
    model = core(ADDED, inputs=", float[N,7] mask", sizes=(4, 4))
    done = fused(model)
    feeds = random_feeds(model, sizes={"N": size})
    assert (done.count("Attention"), done.count("Expand"), done.declined) == (1, 1, ())
    assert_equivalent(model, done.model, feeds, kind="reorder")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("nodes", [PLAIN, PLAIN.replace("axis = -1", "axis = 3")])
def test_sizes_of_keys_and_values_differ(nodes: str, dtype: str) -> None:
    model = core(nodes, dtype=dtype)
    check(model, fused(model))


def test_a_mask_of_negative_and_large_numbers() -> None:
    model = made("twice", "div", "product")
    done, feeds = fused(model), feeds_of(model)
    feeds["mask"][:] = [[-1, -2, -1, -3, -1], [1, 7, -3, 0, 1]]
    assert_equivalent(model, done.model, feeds, kind="reorder")


@pytest.mark.parametrize(("number", "fits"), [(-100, True), (-65504, False), (-np.inf, False)])
def test_masks_in_float16(number: float, fits: bool) -> None:
    bits = int(np.float16(number).view(np.uint16))
    nodes = f"""o = Constant <value = float16 {{0}}> () l = Constant <value = float16 {{{bits}}}> ()
        s = MatMul (q, k) b = Where (keep, o, l) m = Add (s, b) w = Softmax (m) y = MatMul (w, v)"""
    model = core(nodes, inputs=", bool[5,7] keep", dtype="float16")
    done = fused(model)
    assert done.declined == (
        () if fits else ("rows may be masked whole, which float16 cannot tell from -inf",)
    )
    assert_equivalent(model, done.model, random_feeds(model), kind="reorder")


def test_the_standard_says_the_same() -> None:
    model = made("twice", "div", "keep", opset=23)
    done, feeds = fused(model), feeds_of(model)
    (want,) = ReferenceEvaluator(model).run(None, dict(feeds))
    (have,) = ReferenceEvaluator(dump(done.model)).run(None, dict(feeds))
    np.testing.assert_allclose(np.asarray(want), np.asarray(have), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("nodes", "inputs", "reason"),
    [
        (PLAIN.replace("axis = -1", "axis = 2"), "", "Softmax is not along the last axis"),
        (ADDED.replace("half, s", "minus, s"), ", float[5,7] mask", "the scale is no positive number"),
        (ADDED.replace("half, s", "zero, s"), ", float[5,7] mask", "the scale is no positive number"),
        (ADDED.replace("half, s", "c, s"), ", float[5,7] mask, float c", "scale is no constant number"),
        (ADDED.replace("half, s", "each, s"), ", float[5,7] mask", "scale is no constant number"),
        (ADDED, ", float[1,1,1,1,7] mask", "the masked scores are not known to have four axes"),
        (f"{PLAIN} z = Relu (w)", "", "the output of its Softmax is also read elsewhere"),
    ],
)
def test_declined(nodes: str, inputs: str, reason: str) -> None:
    model = core(nodes, inputs=inputs)
    done = fused(model)
    assert (done.changes, done.declined) == (0, (reason,))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"opset": 22}, "Attention came with opset 23"),
        ({"dtype": "double"}, "the type is none that the fused op takes"),
        ({"contrib": True, "dtype": "float16"}, "the type is none that the fused op takes"),
        ({"contrib": True}, "the contrib op takes keys and values that have heads apart in one size only"),
    ],
)
def test_declined_for_what_the_op_takes(how: dict[str, Any], reason: str) -> None:
    contrib = how.pop("contrib", False)
    done = fused(core(PLAIN, **how), contrib=contrib)
    assert (done.changes, done.declined) == (0, (reason,))


def test_a_number_that_is_not_far_below() -> None:
    nodes = "s = MatMul (q, k) m = Where (keep, s, low) w = Softmax (m) y = MatMul (w, v)"
    done = fused(core(nodes, inputs=", bool[5,7] keep"))
    assert done.declined == ("masked scores are replaced by a number that is not far below others",)


def test_sizes_that_may_differ_are_declined() -> None:
    nodes = (
        f"agraph (float[A,3,C,4] q, float[A,3,4,C] k, float[A,3,C,4] v) => (float[N,M,O,P] y) {{ {PLAIN} }}"
    )
    model = onnx.shape_inference.infer_shapes(text_model('<ir_version: 10, opset_import: ["" : 23]>' + nodes))
    check(model, fused(model))
    heads = "float[A,H,C,4] q, float[A,H,4,C] k, float[A,H,C,4] v"
    for old, new, reason in (
        (
            "float[A,3,C,4] q, float[A,3,4,C] k, float[A,3,C,4] v",
            heads,
            "the number or the size of the heads",
        ),
        (
            "float[A,3,4,C] k",
            "float[D,3,4,C] k",
            "queries, keys and values are not known to have the same batch",
        ),
        (
            "float[A,3,C,4] q",
            "float[C,4] q",
            "queries, keys or values are not known to have three or four axes",
        ),
    ):
        text = '<ir_version: 10, opset_import: ["" : 23]>' + nodes.replace(old, new)
        done = fused(onnx.shape_inference.infer_shapes(text_model(text)))
        assert done.changes == 0
        assert done.declined[0].startswith(reason)


def test_in_bodies_and_functions() -> None:
    body = "s = MatMul (q, k) w = Softmax (s) {} = MatMul (w, v)"
    model = onnx.shape_inference.infer_shapes(
        text_model(
            f"""<ir_version: 10, opset_import: ["" : 23]>
        agraph (float[2,3,5,4] q, float[2,3,4,7] k, float[2,3,7,6] v, bool c) => (float[2,3,5,6] y) {{
            y = If (c) <
              then_branch = a () => (float[2,3,5,6] p) {{ {body.format("p")} }},
              else_branch = b () => (float[2,3,5,6] r) {{ {body.format("r")} }}
            >
        }}"""
        )
    )
    done = fused(model)
    assert (done.count("Attention"), done.count("Softmax")) == (2, 0)
    assert_equivalent(model, done.model, random_feeds(model), kind="reorder")


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_any_spelling(data: st.DataObject) -> None:
    def drawn(*choices: Any) -> Any:
        return data.draw(st.sampled_from(choices))

    contrib, size, kv_heads = drawn(False, True), drawn(1, 2, 8), drawn(1, 2)
    split = drawn("transposed", "twice", "flattened", "batched", "apart", "gather")
    heads = kv_heads * drawn(1, 3) if split in ("twice", "flattened") else kv_heads
    mask, join = (
        drawn("", "bias", "choice", "keep", "drop"),
        drawn("joined", "rows" if split == "batched" else "apart"),
    )
    batch, length = drawn("batch", 1, 2), drawn("sequence", 1, 5)
    how = {"heads": heads, "kv_heads": kv_heads, "size": size, "sizes": (batch, length)}
    scale, opset = drawn("div", "mul", "queries", "both", "none"), drawn(14, 17, 20) if contrib else 23
    model = made(split, scale, mask, join, guard=drawn(False, True), opset=opset, **how)
    done = fused(model, contrib=contrib)
    check(model, done, "MultiHeadAttention" if contrib else "Attention")


def test_heads_that_are_not_joined_behind() -> None:
    done = fused(made("batched", "div", "", "apart"))
    assert done.declined == ("heads are not split in front, or not joined behind",)


def test_one_head() -> None:
    nodes = "kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, kt) w = Softmax (s) y = MatMul (w, v)"
    text = f"agraph (float[B,5,4] q, float[B,7,4] k, float[B,7,6] v) => (float[B,5,6] y) {{ {nodes} }}"
    model = text_model('<ir_version: 10, opset_import: ["" : 23]>' + text)
    check(model, fused(model))
