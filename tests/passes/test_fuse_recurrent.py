"""fuse-lstm and fuse-gru against the runtime: forms, sources of the input, readers of the states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.passes.fuse.fuse_gru import FuseGru
from onnxopt.passes.fuse.fuse_lstm import FuseLstm
from onnxopt.passes.infer_shapes import InferShapes
from tests.passes.cells import FORMS, SOURCES, Unrolled
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass

PARTS = "the inputs of the steps are not the parts of one sequence"
INSIDE = "a value inside the cell is read elsewhere"
SMALL = "the states are not known to be as large as the step"


def lstm(net: Unrolled, h: str = "h", c: str = "c") -> tuple[list[str], list[str]]:
    """The hidden and the cell states after each step."""
    hs, cs = [], []
    for x in net.xs():
        h, c = net.lstm(x, h, c)
        hs.append(h)
        cs.append(c)
    return hs, cs


def gru(net: Unrolled, *, reset_after: bool, short: bool) -> list[str]:
    hs, h = [], "h"
    for x in net.xs():
        h = net.gru(x, h, reset_after=reset_after, short=short)
        hs.append(h)
    return hs


def fused(model: onnx.ModelProto, one: Pass, ops: Sequence[str]) -> Rewritten:
    after = run_pass(model, one)
    assert sorted(after.op_types) == sorted(ops)
    assert after.declined == ()
    assert_equivalent(model, after.model, random_feeds(model, sizes={"n": 2}), kind="reorder")
    return after


def kept(model: onnx.ModelProto, one: Pass, *reasons: str) -> None:
    after = run_pass(model, one)
    assert (after.changes, after.declined) == (0, reasons)


def ends(source: str, states: int) -> list[str]:
    """What is around the operator: the input turned, states with one axis more and less."""
    return ["Transpose"] * source.endswith("1") + ["Unsqueeze", "Squeeze"] * states


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMS)
def test_lstm(form: str, source: str, backwards: bool) -> None:
    net = Unrolled(3, form, source, order=(2, 0, 3, 1), backwards=backwards)
    hs, cs = lstm(net)
    fused(net.model([hs[-1], cs[-1]]), FuseLstm(), ["LSTM", *ends(source, 2)])


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", FORMS)
def test_gru(form: str, source: str, reset_after: bool, short: bool) -> None:
    net = Unrolled(3, form, source, order=(2, 1, 0))
    hs = gru(net, reset_after=reset_after, short=short)
    after = fused(net.model([hs[-1]]), FuseGru(), ["GRU", *ends(source, 1)])
    assert after.model.graph.opset_imports[""] == 17
    cell = next(node for node in after.model.graph if node.op_type == "GRU")
    assert ("linear_before_reset" in cell.attributes) == reset_after


@pytest.mark.parametrize("opset", [11, 13, 17, 18])
def test_opsets(opset: int) -> None:
    net = Unrolled(2, opset=opset)
    if opset == 18:
        net.opset = 17
    hs, cs = lstm(net)
    model = net.model([*hs, cs[-1]])
    if opset == 18:
        model = onnx.version_converter.convert_version(model, 18)
    fused(model, FuseLstm(), ["LSTM", "Split", *["Unsqueeze"] * 2, *["Squeeze"] * 4])


@pytest.mark.parametrize("form", FORMS)
def test_a_single_step_is_fused_only_when_asked(form: str) -> None:
    net = Unrolled(1, form, batch="n")
    net.given["x"] = ["n", 3]
    h, c = net.lstm("x", "h", "c")
    model = net.model([h, c])
    kept(model, FuseLstm())
    fused(model, FuseLstm(steps=1), ["LSTM", *["Unsqueeze"] * 3, *["Squeeze"] * 2])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backwards", [False, True])
def test_all_steps_together(backwards: bool, axis: int) -> None:
    net = Unrolled(4, backwards=backwards)
    hs, cs = lstm(net)
    model = net.model([net.stack(hs, axis), hs[-1], cs[-1]])
    fused(model, FuseLstm(), ["LSTM", *["Unsqueeze"] * 2, *["Squeeze"] * 3, *["Transpose"] * axis])


def test_steps_together_in_another_order_or_read_twice() -> None:
    net = Unrolled(3)
    hs, _ = lstm(net)
    model = net.model([net.stack(hs[::-1], 0)])
    assert run_pass(model, FuseLstm()).count("Split") == 1
    net = Unrolled(3)
    hs, _ = lstm(net)
    model = net.model([net.stack(hs, 0), hs[1]])
    after = run_pass(model, FuseLstm())
    assert (after.count("LSTM"), after.count("Split")) == (1, 1)
    assert_equivalent(model, after.model, kind="reorder")


def test_two_layers_need_two_rounds() -> None:
    net = Unrolled(3, inputs=4)
    h, c = "h", "c"
    hs, _ = lstm(net)
    net.form = "apart"
    for x in hs:
        h, c = net.lstm(x, h, c)
    model = net.model([h, c])
    rounds = [FuseLstm(), InferShapes(), FuseLstm()]
    graph = ir.from_proto(model)
    for one in rounds:
        one(graph)
    assert [node.op_type for node in graph.graph].count("LSTM") == 2
    assert_equivalent(model, graph, kind="reorder")


def test_a_state_as_wide_as_the_input_is_told_apart() -> None:
    for form in FORMS:
        net = Unrolled(3, form, inputs=4)
        hs, cs = lstm(net)
        fused(net.model([hs[-1], cs[-1]]), FuseLstm(), ["LSTM", *ends("gather0", 2)])


def test_initial_states_that_are_constants() -> None:
    net = Unrolled(2)
    net.constants["zero"] = np.zeros((2, 4), np.float32)
    hs, _ = lstm(net, "zero", "zero")
    fused(net.model([hs[-1]]), FuseLstm(), ["LSTM", *["Unsqueeze"] * 2, "Squeeze"])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    ("x", "h", "c"),
    [(2, 1, 2), (2, 2, 1), (1, 2, 2), ("n", 1, "n"), ("n", "m", "n"), (2, 2, None)],
)
def test_states_that_are_broadcast_stay(cell: str, x: int | str, h: int | str, c: int | str | None) -> None:
    if cell == "GRU" and x == h:
        return
    net = Unrolled(2, "gemms" if x == h else "sums")
    net.given = {"x": [2, x, 3], "h": [h, 4], "c": [4] if c is None else [c, 4]}
    hs, cs = lstm(net) if cell == "LSTM" else (gru(net, reset_after=True, short=False), [])
    model = net.model([hs[-1], *cs[-1:]])
    kept(model, FuseLstm() if cell == "LSTM" else FuseGru(), SMALL)


def test_double_stays() -> None:
    net = Unrolled(2)
    hs, cs = lstm(net)
    model = net.model([hs[-1], cs[-1]])
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    kept(model, FuseLstm(), "the runtime has no kernel for double")


def test_other_weights_end_a_row() -> None:
    net = Unrolled(4)
    h, c = "h", "c"
    for i, x in enumerate(net.xs()):
        net.constants["b"] = np.zeros(16, np.float32)
        h, c = net.lstm(x, h, c)
        if i == 1:
            net.nodes = [rename(node, "b", "b2") for node in net.nodes]
            net.constants["b2"] = np.ones(16, np.float32)
    kept(net.model([h, c]), FuseLstm(), PARTS, PARTS)


def rename(node: onnx.NodeProto, old: str, new: str) -> onnx.NodeProto:
    node.input[:] = [new if name == old else name for name in node.input]
    return node


def test_steps_that_take_only_some_parts_or_each_twice_stay() -> None:
    for steps in ([0, 1], [0, 1, 1], [1, 0, 2], [0, 2, 1]):
        net = Unrolled(3)
        h, c = "h", "c"
        xs = net.xs()
        for i in steps:
            h, c = net.lstm(xs[i], h, c)
        reason = "the steps do not take the parts of the sequence in order" if len(set(steps)) == 3 else PARTS
        kept(net.model([h, c]), FuseLstm(), reason)


def test_inputs_that_come_from_the_state_stay() -> None:
    """A decoder: the next input is made of the last state."""
    net = Unrolled(1)
    h, c = net.lstm(net.xs()[0], "h", "c")
    x = net.op("MatMul", h, net.constant("back", 4, 3))
    h, c = net.lstm(x, h, c)
    model = net.model([h, c])
    kept(model, FuseLstm(), PARTS)
    after = run_pass(model, FuseLstm(steps=1))
    assert after.declined == (PARTS,)


@pytest.mark.parametrize("which", ["cell state", "gate"])
def test_what_is_read_inside_stays(which: str) -> None:
    net = Unrolled(3)
    hs, cs = lstm(net)
    seen = cs[1] if which == "cell state" else next(n for n in net.nodes if n.op_type == "MatMul").output[0]
    kept(net.model([hs[-1], cs[-1], seen]), FuseLstm(), INSIDE)


def test_what_is_no_cell() -> None:
    for change in ("Sigmoid", "Tanh", "Split", "Gemm"):
        net = Unrolled(2, "gemms")
        hs, cs = lstm(net)
        model = net.model([hs[-1], cs[-1]])
        for node in model.graph.node:
            if node.op_type == change == "Split":
                node.op_type, node.attribute[0].i = "Split", 0
            elif node.op_type == change == "Gemm":
                node.attribute.append(onnx.helper.make_attribute("alpha", 2.0))
            elif node.op_type == change:
                node.op_type = "Relu"
        kept(model, FuseLstm())


def test_overridable_weights_stay() -> None:
    net = Unrolled(2)
    hs, cs = lstm(net)
    model = net.model([hs[-1], cs[-1]])
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 16]))
    kept(model, FuseLstm())


def test_in_a_body() -> None:
    net = Unrolled(2)
    hs, cs = lstm(net)
    inner = net.model([hs[-1], cs[-1]]).graph
    empty = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["h"], ["e"]), onnx.helper.make_node("Identity", ["c"], ["f"])],
        "no",
        [],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in "ef"],
    )
    inputs = [*inner.input, onnx.helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, [])]
    results = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in ("p", "q")
    ]
    tensors = list(inner.initializer)
    del inner.input[:], inner.initializer[:]
    node = onnx.helper.make_node("If", ["go"], ["p", "q"], then_branch=inner, else_branch=empty)
    graph = onnx.helper.make_graph([node], "outer", inputs, results, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    after = run_pass(model, FuseLstm())
    assert after.count("LSTM") == 1
    feeds = [random_feeds(model) | {"go": np.array(go)} for go in (True, False)]
    assert_equivalent(model, after.model, feeds, kind="reorder")


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_random_networks(data: st.DataObject) -> None:
    """Any form of either cell, whoever reads its states, gives the same numbers fused."""
    draw = data.draw
    net = Unrolled(
        draw(st.integers(1, 4)),
        draw(st.sampled_from(FORMS)),
        draw(st.sampled_from(SOURCES)),
        draw(st.permutations(range(4))),
        draw(st.booleans()),
        draw(st.one_of(st.integers(1, 2), st.just("n"))),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    one: Pass
    if draw(st.booleans()):
        (hs, cs), one = lstm(net), FuseLstm(steps=draw(st.integers(1, 2)))
        outputs = [draw(st.sampled_from(cs))]
    else:
        hs = gru(net, reset_after=draw(st.booleans()), short=draw(st.booleans()))
        one, outputs = FuseGru(steps=draw(st.integers(1, 2))), []
    outputs += draw(st.lists(st.sampled_from(hs), unique=True))
    if draw(st.booleans()) or not outputs:
        outputs.append(net.stack(hs, draw(st.sampled_from([0, 1]))))
    model = net.model(outputs)
    feeds = random_feeds(model, sizes={"n": 3})
    assert_equivalent(model, run_pass(model, one).model, feeds, kind="reorder")
