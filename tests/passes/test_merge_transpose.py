"""merge-transpose against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxopt.passes.merge.merge_transpose import MergeTranspose
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"


def perm_text(perm: tuple[int, ...] | None) -> str:
    return "" if perm is None else f"<perm = [{', '.join(map(str, perm))}]>"


def pair(
    first: tuple[int, ...] | None, second: tuple[int, ...] | None, *, output: str = "z"
) -> onnx.ModelProto:
    return text_model(
        f"""agraph (float[2, 3, 4] x) => (float[a, b, c] {output}) {{
          y = Transpose {perm_text(first)} (x)
          w = Transpose {perm_text(second)} (y)
          z = Neg (w)
        }}"""
    )


@pytest.mark.parametrize("first", [None, (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("second", [None, (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_pair(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> None:
    model = pair(first, second)
    after = run_pass(model, MergeTranspose())
    p, q = first or (2, 1, 0), second or (2, 1, 0)
    undone = [p[axis] for axis in q] == [0, 1, 2]
    assert after.op_types == (["Neg"] if undone else ["Transpose", "Neg"])
    assert_equivalent(model, after.model)


def test_order_of_perms() -> None:
    model = text_model(
        """agraph (float[2, 3, 4] x) => (float[4, 2, 3] z) {
          y = Transpose <perm = [1, 0, 2]> (x)
          z = Transpose <perm = [2, 1, 0]> (y)
        }"""
    )
    after = run_pass(model, MergeTranspose())
    assert list(after.model.graph.node(0).attributes["perm"].as_ints()) == [2, 0, 1]
    assert_equivalent(model, after.model)


def test_chain_of_four_and_defaults_of_unknown_rank() -> None:
    text = "y = Transpose (x)\n w = Transpose (y)\n v = Transpose (w)\n u = Transpose (v)\n z = Neg (u)"
    model = helper.make_model(
        onnx.parser.parse_graph(f"g (float[2, 3] x) => (float[a, b] z) {{ {text} }}"), ir_version=10
    )
    model.opset_import[0].version = 17
    model.graph.input[0].type.tensor_type.ClearField("shape")
    after = run_pass(model, MergeTranspose())
    assert after.op_types == ["Neg"]
    assert_equivalent(model, after.model, {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize(("second", "left"), [((1, 0), 1), ((0, 1), 2)])
def test_shared_value_goes_only_if_both_do(second: tuple[int, int], left: int) -> None:
    model = text_model(
        f"""agraph (float[2, 3] x) => (float[3, 2] y, float[a, b] z) {{
          y = Transpose <perm = [1, 0]> (x)
          w = Transpose {perm_text(second)} (y)
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeTranspose())
    assert after.count("Transpose") == left
    assert after.declined == (() if left == 1 else (SHARED,))
    assert_equivalent(model, after.model)


def test_perms_of_different_length_are_declined() -> None:
    model = text_model(
        """agraph (float[2, 3] x) => (float[a, b, c] z) {
          y = Transpose <perm = [1, 0]> (x)
          z = Transpose <perm = [0, 2, 1]> (y)
        }"""
    )
    assert run_pass(model, MergeTranspose()).declined == ("perm is no permutation of the same axes",)


def test_inside_a_branch() -> None:
    model = text_model(
        """agraph (bool c, float[2, 3] x) => (float[a, b] z) {
          z = If (c) <
            then_branch = yes () => (float[a, b] t) {
              p = Transpose <perm = [1, 0]> (x)
              q = Transpose (p)
              t = Neg (q)
            },
            else_branch = no () => (float[a, b] e) { e = Abs (x) }
          >
        }"""
    )
    after = run_pass(model, MergeTranspose())
    assert after.op_types == ["If", "Neg", "Abs"]
    assert_equivalent(model, after.model, {"c": np.array(True), "x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("reference", [False, True])
def test_inside_a_function(reference: bool) -> None:
    perm = "perm : ints = @p" if reference else "perm = [1, 0]"
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (float[2, 3] x) => (float[a, b] z) {{ z = local.turn <p = [1, 0]> (x) }}
        <domain: "local", opset_import: ["" : 17]>
        turn <p> (x) => (z) {{
          y = Transpose <{perm}> (x)
          w = Transpose <perm = [1, 0]> (y)
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeTranspose())
    assert after.count("Transpose") == (2 if reference else 0)
    assert after.declined == (("an attribute refers to one of the enclosing function",) if reference else ())
    assert_equivalent(model, after.model)


@given(data=st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_random_chains(data: st.DataObject) -> None:
    rank, length = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    perms = st.one_of(st.none(), st.permutations(range(rank)))
    dims = data.draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank))
    shape = dims if data.draw(st.booleans()) else None
    nodes = []
    for i in range(length):
        perm = data.draw(perms)
        attributes: dict[str, Any] = {} if perm is None else {"perm": perm}
        nodes.append(helper.make_node("Transpose", [f"t{i}"], [f"t{i + 1}"], **attributes))
    nodes.append(helper.make_node("Neg", [f"t{length}"], ["z"]))
    source = helper.make_tensor_value_info("t0", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [source], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    after = run_pass(model, MergeTranspose())
    assert after.count("Transpose") <= 1
    assert_equivalent(model, after.model, {"t0": np.arange(np.prod(dims), dtype=np.float32).reshape(dims)})
