"""reorder-nodes: the same numbers, a valid order, and a peak that `inspect` finds lower."""

from __future__ import annotations

import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt import inspect
from onnxopt.passes.reorder_nodes import ReorderNodes
from onnxopt.protobuf import dump
from tests.support import assert_equivalent, run_pass, text_model


def peak(model: onnx.ModelProto | ir.Model) -> int:
    found = inspect(model).peak_activation_bytes
    assert isinstance(found, int)
    return found


def heads(count: int, order: list[int] | None = None) -> onnx.ModelProto:
    """Each head makes much of `x` and keeps little: first all the first halves, then all the second."""
    both = [f"a{i} = Tile(x, many)" for i in range(count)] + [f"p{i} = ReduceMax(a{i})" for i in range(count)]
    lines = [both[i] for i in order] if order else both
    outputs = ", ".join(f"float[1,1] p{i}" for i in range(count))
    return onnx.shape_inference.infer_shapes(
        text_model(f"agraph (float[4,4] x) => ({outputs}) <int64[2] many = {{8, 8}}> {{ {' '.join(lines)} }}")
    )


def test_heads_run_one_after_the_other() -> None:
    before = heads(4)
    done = run_pass(before, ReorderNodes())
    assert done.op_types == ["Tile", "ReduceMax"] * 4
    large = 4 * 8 * 4 * 8 * 4
    assert (peak(before), peak(done.model)) == (4 * large + 64, large + 64 + 3 * 4)
    assert_equivalent(before, done.model)


def test_an_order_that_is_good_stays() -> None:
    done = run_pass(heads(3, [0, 3, 1, 4, 2, 5]), ReorderNodes())
    assert done.changes == 0


def test_constant_nodes_come_before_what_reads_them() -> None:
    before = heads(3)
    del before.graph.initializer[:]
    many = onnx.numpy_helper.from_array(np.array([8, 8]), "many")
    before.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["many"], value=many))
    before.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["unread"], value_float=1.0))
    done = run_pass(before, ReorderNodes())
    assert done.op_types == ["Constant"] * 2 + ["Tile", "ReduceMax"] * 3
    assert_equivalent(before, done.model)


def test_only_the_standard_constant_is_one() -> None:
    before = heads(3)
    for node in before.graph.node[:2]:
        node.op_type, node.domain = "Constant", "my"
    before.opset_import.append(onnx.helper.make_opsetid("my", 1))
    after = run_pass(before, ReorderNodes()).model
    assert [node.op_type for node in after.graph] == ["Constant", "ReduceMax"] * 2 + ["Tile", "ReduceMax"]


def test_bodies_are_ordered_and_captures_are_kept_alive() -> None:
    before = text_model("""agraph (float[4,4] x, bool c) => (float[1,1] y) <int64[2] many = {8, 8}> {
        outer = Neg(x)
        y = If (c) <
          then_branch = t () => (float[1,1] s) {
            a = Tile(outer, many) b = Tile(x, many) p = ReduceMax(a) q = ReduceMin(b) s = Add(p, q)
          },
          else_branch = e () => (float[1,1] r) { r = ReduceMax(outer) }
        >
    }""")
    done = run_pass(onnx.shape_inference.infer_shapes(before), ReorderNodes())
    body = done.model.graph[1].attributes["then_branch"].as_graph()
    assert [node.op_type for node in body] == ["Tile", "ReduceMax", "Tile", "ReduceMin", "Add"]
    for c in (True, False):
        assert_equivalent(before, done.model, {"x": np.eye(4, dtype=np.float32), "c": np.array(c)})


@pytest.mark.parametrize("size", [500, 4000])
def test_many_nodes_are_ordered_in_one_sweep(size: int) -> None:
    before = heads(size)
    done = run_pass(before, ReorderNodes(), rounds=2)
    assert done.op_types[:4] == ["Tile", "ReduceMax", "Tile", "ReduceMax"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 14), st.randoms(use_true_random=False))
def test_any_graph_keeps_its_numbers_and_never_needs_more(size: int, rng: random.Random) -> None:
    lines, shapes = list[str](), {"x": (2, 2)}
    for i in range(size):
        source = rng.choice(list(shapes))
        if rng.random() < 0.4 and max(shapes[source]) < 20:
            lines.append(f"v{i} = Tile({source}, many)")
            shapes[f"v{i}"] = (shapes[source][0] * 3, shapes[source][1] * 2)
        elif rng.random() < 0.5:
            lines.append(f"v{i} = ReduceMean({source})")
            shapes[f"v{i}"] = (1, 1)
        else:
            lines.append(
                f"v{i} = Add({source}, {rng.choice([n for n in shapes if shapes[n] == shapes[source]])})"
            )
            shapes[f"v{i}"] = shapes[source]
    outputs = sorted({f"v{size - 1}", rng.choice(list(shapes)[1:])})
    before = text_model(
        f"agraph (float[2,2] x) => ({', '.join(f'float[A,B] {o}' for o in outputs)})"
        f" <int64[2] many = {{3, 2}}> {{ {' '.join(lines)} }}"
    )
    for output in before.graph.output:
        output.type.tensor_type.ClearField("shape")
    before = onnx.shape_inference.infer_shapes(before)
    done = run_pass(before, ReorderNodes())
    assert_equivalent(before, done.model)
    assert peak(dump(done.model)) <= peak(before)
