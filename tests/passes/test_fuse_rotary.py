"""fuse-rotary against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from models.llama import llama
from onnxopt.passes.fuse.fuse_rotary import FuseRotary
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

SIZES = {"B": 2, "S": 5}
HALVES = {
    "slice": "low = Slice (x, i0, i3, last) high = Slice (x, i3, i6, last)",
    "negative": "low = Slice (x, i0, i3, minus) high = Slice (x, i3, end, minus, i1)",
    "split": "low, high = Split <axis = -1> (x, threes)",
}
TURNED = "m = Neg (high) t = Concat <axis = -1> (m, low) a = Mul ({}) b = Mul ({}) y = Add ({})"
ORDERS = (("x, cos", "t, sin", "a, b"), ("cos, x", "sin, t", "b, a"))
TABLES = {
    "angles": "d = Concat <axis = -1> (angles, angles) c = Cos (d) s = Sin (d)",
    "scaled": """d = Concat <axis = -1> (angles, angles) e = Cos (d) c = Mul (e, two)
        f = Sin (d) s = Div (f, two)""",
    "gathered": "c = Gather (cosines, ids) s = Gather (sines, ids)",
}
WIDE = {
    1: "cos = Unsqueeze (c, i1) sin = Unsqueeze (s, i1)",
    2: "cos = Unsqueeze (c, i2) sin = Unsqueeze (s, i2)",
}


def rotary(
    nodes: str, *, heads: int = 1, opset: int = 23, twice: bool = True, dtype: str = "float"
) -> onnx.ModelProto:
    """x with its heads on this axis, [batch, heads, length, 6] or [batch, length, heads, 6]."""
    shape = "B,4,S,6" if heads == 1 else "B,S,4,6"
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        agraph ({dtype}[{shape}] x, {dtype}[B,S,3] angles, int64[B,S] ids, {dtype}[B,S,6] free)
            => ({dtype}[{shape}] y)
        <int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] i3 = {{3}},
         int64[1] i6 = {{6}}, int64[1] last = {{3}}, int64[1] minus = {{-1}}, int64[1] end = {{9000000000}},
         int64[2] threes = {{3, 3}}, {dtype} two = {{2}}> {{ {nodes} }}"""
    )
    rng = np.random.default_rng(0)
    for name in ("cosines", "sines"):
        half = rng.normal(size=(7, 3)).astype(np.float16 if dtype == "float16" else np.float32)
        array = np.concatenate([half, half if twice else half + 1], 1)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def check(model: onnx.ModelProto, done: Rewritten) -> None:
    assert (done.count("RotaryEmbedding"), done.count("Neg"), done.declined) == (1, 0, ())
    assert_equivalent(model, done.model, random_feeds(model, sizes=SIZES), kind="reorder")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("heads", [1, 2])
def test_halves_that_turn(half: str, table: str, heads: int, order: tuple[str, str, str]) -> None:
    nodes = f"{TABLES[table]} {WIDE[heads]} {HALVES[half]} {TURNED.format(*order)}"
    model = rotary(nodes, heads=heads)
    done = run_pass(model, FuseRotary())
    check(model, done)
    assert done.count("Concat") + done.count("Unsqueeze") == 0


def test_before_the_heads_are_split() -> None:
    model = onnx.shape_inference.infer_shapes(llama(layers=1))
    model.opset_import[0].version = 23
    for node in model.graph.node:
        if node.op_type == "ReduceMean":
            node.attribute.pop()
            node.input.append("axes")
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "axes"))
    done = run_pass(model, FuseRotary())
    assert (done.count("RotaryEmbedding"), done.count("Neg"), done.declined) == (2, 0, ())
    turned = [node for node in done.model.graph if node.op_type == "RotaryEmbedding"]
    assert [node.attributes["num_heads"].as_int() for node in turned] == [4, 2]
    sizes = {"batch": 2, "sequence": 3, "past": 4, "total": 7}
    assert_equivalent(model, done.model, random_feeds(model, sizes=sizes), kind="reorder")


def test_float16() -> None:
    model = rotary(
        f"{TABLES['gathered']} {WIDE[1]} {HALVES['slice']} {TURNED.format(*ORDERS[0])}", dtype="float16"
    )
    check(model, run_pass(model, FuseRotary()))


USUAL = f"{TABLES['gathered']} {WIDE[1]} {HALVES['slice']} {TURNED.format(*ORDERS[0])}"
FREE = USUAL.replace("(c,", "(free,")
ALIKE = (
    USUAL.replace("cosines, ids", "cosines, i3")
    .replace("sines, ids", "sines, i3")
    .replace("i1) sin", "i0) sin")
)
NOT_TWICE = "sine or cosine are not known to be the same in both halves of a head"


@pytest.mark.parametrize(
    ("nodes", "how", "reason"),
    [
        (USUAL, {"opset": 22}, "RotaryEmbedding came with opset 23"),
        (USUAL, {"dtype": "double"}, "the type is none that RotaryEmbedding takes"),
        (USUAL, {"twice": False}, NOT_TWICE),
        (FREE, {}, NOT_TWICE),
        (ALIKE, {}, "sine or cosine are not given for each batch and position"),
        (USUAL + " z = Relu (t)", {}, "the output of its Concat is also read elsewhere"),
    ],
)
def test_declined(nodes: str, how: dict[str, Any], reason: str) -> None:
    done = run_pass(rotary(nodes, **how), FuseRotary())
    assert (done.changes, done.declined) == (0, (reason,))


@pytest.mark.parametrize(
    "halves",
    [
        "low = Slice (x, i0, i3, last) high = Slice (x, i2, i6, last)",
        "high = Slice (x, i0, i3, last) low = Slice (x, i3, i6, last)",
        "high, low = Split <axis = -1> (x, threes)",
        "low = Slice (x, i0, i3, i2) high = Slice (x, i3, i6, i2)",
        "low = Slice (x, i0, i6, last, i2) high = Slice (x, i3, i6, last)",
        "low = Slice (x, i0, i3, last) high = Slice (cos, i3, i6, last)",
    ],
)
def test_other_halves_stay(halves: str) -> None:
    model = rotary(f"{TABLES['gathered']} {WIDE[1]} {halves} {TURNED.format(*ORDERS[0])}")
    done = run_pass(model, FuseRotary())
    assert (done.changes, done.declined) == (0, ())


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.data())
def test_angles_of_any_size(data: st.DataObject) -> None:
    order, table = data.draw(st.sampled_from(ORDERS)), data.draw(st.sampled_from(list(TABLES)))
    half, heads = data.draw(st.sampled_from(list(HALVES))), data.draw(st.sampled_from([1, 2]))
    model = rotary(f"{TABLES[table]} {WIDE[heads]} {HALVES[half]} {TURNED.format(*order)}", heads=heads)
    sizes = {"B": data.draw(st.integers(1, 3)), "S": data.draw(st.integers(1, 6))}
    feeds = random_feeds(model, data.draw(st.integers(0, 99)), sizes)
    feeds["ids"] = feeds["ids"] * data.draw(st.sampled_from([1, 6, -1]))
    done = run_pass(model, FuseRotary())
    assert done.count("RotaryEmbedding") == 1
    assert_equivalent(model, done.model, feeds, kind="reorder")
