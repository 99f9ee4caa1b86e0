"""Floats in 16 bits: the numbers hold, each value is cast once, what needs float32 keeps it, by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from onnxopt.errors import UsageError
from onnxopt.graph import nodes
from onnxopt.ledger import Ledger
from onnxopt.model import load
from onnxopt.passes.quantize.quantize_floats import QuantizeFloats
from onnxopt.protobuf import dump
from onnxopt.recipe import parse_pass
from onnxopt.storage import save
from onnxopt.streamed import Streamed
from tests.random_graphs import FAMILIES, random_model
from tests.support import Rewritten, execute, random_feeds, run_pass, sqnr, text_model

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
CONV = "agraph (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w = {1, 2, 3, 4}> "


def agrees(proto: onnx.ModelProto, done: Rewritten, at_least: float = 50) -> None:
    feeds = random_feeds(proto)
    for want, have in zip(execute(proto, feeds), execute(done.model, feeds), strict=True):
        assert (want.dtype, want.shape) == (have.dtype, have.shape)
        assert sqnr(want, have) >= at_least


def changed(text: str, **options: Any) -> Rewritten:
    """The model after the pass, whose numbers hold."""
    proto = text_model(text)
    done = run_pass(proto, QuantizeFloats(**options))
    agrees(proto, done)
    return done


def test_numbers_that_float16_holds_come_out_the_same_to_the_bit() -> None:
    proto = text_model(CONV + "{ c = Conv(x, w) r = Relu(c) y = Add(r, r) }")
    done = run_pass(proto, QuantizeFloats())
    x = np.arange(-16, 16, dtype=np.float32).reshape(1, 2, 4, 4)
    np.testing.assert_array_equal(execute(done.model, {"x": x})[0], execute(proto, {"x": x})[0])
    assert done.op_types == ["Cast", "Conv", "Relu", "Add", "Cast"]
    assert list(done.model.graph.initializers) == ["w_float16"]
    assert done.model.graph.initializers["w_float16"].dtype == HALF


def test_each_value_is_cast_once_and_each_constant_stored_once_in_each_type() -> None:
    done = changed(
        CONV + "{ a = Conv(x, w) b = Conv(a, w) s = Softmax(b) t = Exp(b) u = Mul(w, w) v = Exp(w)"
        "p = Conv(s, u) q = Conv(s, v) m = Mul(p, q) y = Add(m, t) }",
        ranges={"v": (0, 60), "t": (0, 90), "q": (0, 90), "m": (0, 90)},
    )
    casts = [node.inputs[0].name for node in nodes(done.model) if node.op_type == "Cast" and node.inputs[0]]
    assert sorted(filter(None, casts)) == sorted({*filter(None, casts)})
    assert sorted(done.model.graph.initializers) == ["w", "w_float16"]


def test_outputs_keep_their_names_and_types_where_others_read_them_too() -> None:
    done = changed(
        "agraph (float[2, 2] x) => (float[2, 2] y, float[2, 2] z, float[2, 2] s)"
        "<float[2, 2] w = {1, 2, 3, 4}>"
        "{ y = MatMul(x, w) z = Relu(y) s = Softmax(y) }"
    )
    assert [value.name for value in done.model.graph.outputs] == ["y", "z", "s"]
    assert done.count("Cast") == 3


def test_without_io_kept_the_signature_is_in_16_bits() -> None:
    proto = text_model(CONV + "{ c = Conv(x, w) y = Softmax(c) }")
    one = QuantizeFloats(keep_io=False)
    assert (one.keeps_signature, str(one)) == (False, "quantize-floats{keep_io=false}")
    done = run_pass(proto, one)
    ports = (*done.model.graph.inputs, *done.model.graph.outputs)
    assert [(value.name, value.dtype) for value in ports] == [("x", HALF), ("y", HALF)]
    x = random_feeds(proto)["x"]
    have = execute(done.model, {"x": x.astype(np.float16)})[0]
    assert sqnr(execute(proto, {"x": x})[0], have.astype(np.float32)) > 50


BRANCHES = """agraph (float[2, 2] x, bool c) => (float[2, 2] y) <float[2, 2] w = {1, 2, 3, 4}> {
    a = MatMul(x, w)
    y = If(c) <
        then_branch = t () => (float[2, 2] p) { m = MatMul(a, w) p = Add(m, x) },
        else_branch = e () => (float[2, 2] q) { q = Exp(a) }
    >
}"""


@pytest.mark.parametrize("taken", [True, False])
def test_bodies_are_converted_and_what_they_capture_is_cast_outside(taken: bool) -> None:
    proto = text_model(BRANCHES)
    done = run_pass(proto, QuantizeFloats())
    feeds = {**random_feeds(proto), "c": np.array(taken)}
    assert sqnr(execute(proto, feeds)[0], execute(done.model, feeds)[0]) > 50
    outer = [node.op_type for node in done.model.graph]
    assert outer == ["Cast", "MatMul", "Cast", "If"]
    then = done.model.graph[-1].attributes["then_branch"].as_graph()
    assert [(node.op_type, node.outputs[0].dtype) for node in then] == [
        ("MatMul", HALF), ("Add", HALF), ("Cast", FLOAT),
    ]  # fmt: skip
    assert "what goes into its bodies and comes out of them stays in float32" in done.declined


def test_the_state_of_a_loop_stays_in_float32() -> None:
    proto = text_model(
        """agraph (float[2, 2] x, int64 n) => (float[2, 2] y, float[k, 2, 2] all)
        <float[2, 2] w = {0.5, 0.25, 0.125, 0.5}, bool go = {1}> {
            y, all = Loop(n, go, x) <body = b (int64 i, bool c, float[2, 2] s) =>
                (bool d, float[2, 2] o, float[2, 2] u) { d = Identity(c) o = MatMul(s, w) u = Relu(o) }>
        }"""
    )
    done = run_pass(proto, QuantizeFloats())
    feeds = {"x": random_feeds(proto)["x"], "n": np.array(5)}
    for want, have in zip(execute(proto, feeds), execute(done.model, feeds), strict=True):
        assert sqnr(want, have) > 50
    body = done.model.graph[0].attributes["body"].as_graph()
    assert [value.dtype for value in (*body.inputs, *body.outputs)].count(FLOAT) == 3
    assert [node.op_type for node in body] == ["Cast", "Identity", "MatMul", "Cast", "Relu", "Cast"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("c = Conv(x, w) y = Softmax(c)", "Softmax sums or leaves the range of float16"),
        ("c = Conv(x, w) e = Exp(c) y = Neg(e)", "what it reads or gives may not fit float16"),
        ("c = Conv(x, w) k = Constant<value_float = 1.0e6>() y = Mul(c, k)",
         "a constant of it leaves the range of float16"),
        ("c = Conv(x, w) r = Relu(c) k = Constant<value_float = 1.0e-12>() y = Add(r, k)",
         "a constant of it vanishes in float16"),
        ("k = Constant<value = float[1, 2, 1, 1] {1.0e-12, -2.0e-12}>() y = Conv(x, k)",
         "a constant of it vanishes in float16"),
        ("r = Relu(x) y = Conv(r, w)", "follows its inputs, which are in float32"),
        ("c = Conv(x, w) s = com.microsoft.QuickGelu(c) y = Relu(s)",
         "the types that an operator of com.microsoft takes are not known"),
        ("c = Conv(x, w) s = SequenceConstruct(c, x) y = SequenceAt(s, i)",
         "it handles sequences or optional values"),
        ("c = Conv(x, w) t = Cast<to = 1>(h) y = GridSample(c, t)", "GridSample stays in float32"),
        ("q = QuantizeLinear(x, one, zp) d = DequantizeLinear(q, one, zp) y = Conv(d, w)",
         "is quantized already"),
    ],
)  # fmt: skip
def test_what_stays_in_float32_says_why(text: str, reason: str) -> None:
    graph = (
        '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>'
        "agraph (float[1, 2, 4, 4] x, float16[1, 4, 4, 2] h) => (float[1, 2, 4, 4] y)"
        "<float[2, 2, 1, 1] w = {1, 2, 3, 4}, float one = {0.01}, int8 zp = {0}, int64 i = {0}> { %s }"
    )
    done = changed(graph % text)
    assert reason in done.declined


def test_a_constant_that_callers_may_override_is_named() -> None:
    text = (
        "agraph (float[1, 2, 4, 4] x, float[2, 2, 1, 1] w) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w = "
    )
    done = changed(text + "{1, 2, 3, 4}> { y = Conv(x, w) }")
    assert done.declined == ("a constant of it is also a graph input, which callers may override",)


def test_functions_are_to_be_inlined_first() -> None:
    done = changed(
        """<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[2, 2] x) => (float[2, 2] y) { y = my.square(x) }
        <domain: "my", opset_import: ["" : 17]> square (a) => (b) { b = MatMul(a, a) }"""
    )
    assert done.changes == 0
    assert "a function, whose types are not known: inline it first" in done.declined


def test_values_beyond_the_range_seen_stay_in_float32(tmp_path: Path) -> None:
    text = CONV + "{ c = Conv(x, w) r = Relu(c) d = Conv(r, w) y = Relu(d) }"
    reach = {"c": (-5.0, 3e4), "d": (-1.0, 16000.0)}
    done = changed(text, ranges=reach)
    kinds = {node.outputs[0].name: node.inputs[0] for node in nodes(done.model)}
    assert [value.dtype for name in ("c", "r") if (value := kinds[name])] == [FLOAT, FLOAT]
    assert done.declined.count("what it reads or gives may not fit float16") == 2
    tiny = changed(text, ranges={"d": (-1e-5, 1e-5)})
    assert "what it reads or gives may not fit float16" in tiny.declined
    file = tmp_path / "ranges.json"
    file.write_text(json.dumps(reach))
    read = parse_pass(f"quantize-floats{{ranges={file}}}")
    assert isinstance(read, QuantizeFloats)
    assert run_pass(text_model(text), read).op_types == done.op_types
    assert str(read) == f"quantize-floats{{ranges={file}}}"
    assert str(QuantizeFloats(ranges=reach)) == "quantize-floats"


@pytest.mark.parametrize("content", [None, "no", "[1]", '{"c": 3}', '{"c": [1, "x"]}'])
def test_ranges_that_cannot_be_read_are_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "ranges.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r'ranges .*ranges\.json: expected JSON, \{"value"'):
        QuantizeFloats(ranges=str(file))


def test_a_row_that_is_masked_whole_stays_finite() -> None:
    proto = text_model(
        """agraph (float[2, 4] q, float[4, 3] k, bool[2, 3] mask) => (float[2, 3] y)
        <float low = {-3.4028235e38}> {
            s = MatMul(q, k)
            m = Where(mask, s, low)
            u = Add(m, s)
            y = Softmax(u)
        }"""
    )
    done = run_pass(proto, QuantizeFloats())
    feeds = {**random_feeds(proto), "mask": np.array([[0, 0, 0], [1, 0, 1]], bool)}
    want, have = execute(proto, feeds)[0], execute(done.model, feeds)[0]
    assert np.isfinite(want).all()
    np.testing.assert_allclose(have, want, atol=2e-3)


def test_bounds_of_a_clip_may_lie_beyond_the_range() -> None:
    done = changed(CONV + "{ c = Conv(x, w) h = Constant<value_float = 3.0e38>() y = Clip(c, , h) }")
    assert [node.outputs[0].dtype for node in nodes(done.model) if node.op_type == "Clip"] == [HALF]


def test_positions_and_sizes_are_not_rounded_and_bytes_become_halves() -> None:
    proto = text_model(
        """agraph (int64[1, 3] p, uint8[1, 2, 4, 4] b) => (float[3, 2] s, float[1, 2, 8, 8] y)
        <float[2] f = {1, 0.01}, float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[4] scales = {1, 1, 2, 2},
         int64[2] column = {3, 1}, int64[2] row = {1, 2}> {
            q = Cast<to = 1>(p)
            c = Reshape(q, column)
            r = Reshape(f, row)
            a = MatMul(c, r)
            s = Sin(a)
            x = Cast<to = 1>(b)
            n = Conv(x, w)
            y = Resize<mode = "nearest">(n, , scales)
        }"""
    )
    done = run_pass(proto, QuantizeFloats())
    feeds = {"p": np.array([[5, 4099, 100003]]), "b": np.arange(32, dtype=np.uint8).reshape(1, 2, 4, 4)}
    for want, have in zip(execute(proto, feeds), execute(done.model, feeds), strict=True):
        np.testing.assert_array_equal(have, want)
    types = {node.op_type: node.outputs[0].dtype for node in nodes(done.model)}
    assert (types["MatMul"], types["Sin"], types["Conv"], types["Resize"]) == (FLOAT, FLOAT, HALF, HALF)
    assert done.count("Cast") == 3


def test_bfloat16_rounds_to_eight_bits_and_asks_for_the_opset_it_needs() -> None:
    text = "agraph (float[4, 4] x) => (float[4, 4] y) { m = MatMul(x, w) y = Relu(m) }"
    proto = text_model('<ir_version: 10, opset_import: ["" : 22]>' + text)
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    done = run_pass(proto, QuantizeFloats(type="bfloat16"))
    assert done.op_types == ["Cast", "MatMul", "Relu", "Cast"]
    feeds = random_feeds(proto)
    have: Any = ReferenceEvaluator(dump(done.model)).run(None, feeds)
    assert 35 < sqnr(execute(proto, feeds)[0], have[0]) < 60
    for opset, reason in (
        (17, "Conv of bfloat16 came with opset 22"),
        (12, "Cast to bfloat16 came with opset 13"),
    ):
        model = text_model(f'<ir_version: 10, opset_import: ["" : {opset}]>' + CONV + "{ y = Conv(x, w) }")
        ledger = Ledger()
        QuantizeFloats(type="bfloat16").apply(ir.from_proto(model), ledger)
        assert [*ledger.declined.values()] == [reason]
        assert ledger.opsets_wanted == {int(reason[-2:])}


def test_weights_on_disk_are_rounded_when_they_are_read(tmp_path: Path) -> None:
    proto = text_model("agraph (float[1, 600] x) => (float[1, 600] y) { y = MatMul(x, w) }")
    weight = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    save(ir.from_proto(proto), tmp_path / "m.onnx", external_data=True)
    model = load(tmp_path / "m.onnx")
    QuantizeFloats().apply(model, Ledger())
    narrow = model.graph.initializers["w_float16"].const_value
    assert isinstance(narrow, Streamed)
    np.testing.assert_array_equal(narrow.numpy(), weight.astype(np.float16))


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 12),
    family=st.sampled_from(["layers", "normalizations", *sorted(FAMILIES)]),
    limit=st.none() | st.integers(1, 8),
    keep_io=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_random_models_hold(seed: int, steps: int, family: str, limit: int | None, keep_io: bool) -> None:
    model = random_model(seed, steps, family)
    try:
        wanted = [execute(model.proto, feeds) for feeds in model.feeds]
    except Exception:  # ONNX Runtime's classes have no common base below Exception
        assume(False)
    one = QuantizeFloats(keep_io=keep_io)
    if limit is None:
        after = run_pass(model.proto, one).model
    else:
        after = ir.from_proto(model.proto)
        one.apply(after, Ledger(limit, pass_name=one.name))
    onnx.checker.check_model(dump(after))
    types = {value.name: value.dtype.numpy() for value in after.graph.inputs if value.dtype}
    for feeds, wants in zip(model.feeds, wanted, strict=True):
        given = {name: array.astype(types[name]) for name, array in feeds.items()}
        for want, have in zip(wants, execute(after, given), strict=True):
            assert want.shape == have.shape
            if want.dtype == np.float32 and want.size:
                assert sqnr(want, have.astype(np.float32)) > 30
