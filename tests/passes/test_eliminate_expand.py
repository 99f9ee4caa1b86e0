"""eliminate-expand against the runtime."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.eliminate.eliminate_expand import EliminateExpand
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model


def model(nodes: str, inputs: str = "float[N, 1] x, float[N, 8] z", rank: int = 2) -> onnx.ModelProto:
    result = ", ".join(f"q{axis}" for axis in range(rank))
    held = "int64[2] five = {1, 5}, int64[2] eight = {1, 8}, int64[3] more = {3, 1, 8}, float s = {2}"
    return onnx.shape_inference.infer_shapes(
        text_model(f"agraph ({inputs}) => (float[{result}] y) <{held}> {{ {nodes} }}")
    )


def check(proto: onnx.ModelProto) -> Rewritten:
    done = run_pass(proto, EliminateExpand())
    assert_equivalent(proto, done.model, [random_feeds(proto, sizes={"N": n, "M": n}) for n in (3, 1)])
    return done


SHAPE = "t = Shape (z)\n e = Expand (x, t)\n"


@pytest.mark.parametrize(
    ("nodes", "rank"),
    [
        (SHAPE + "y = Add (e, z)", 2),
        (SHAPE + "y = Pow (z, e)", 2),
        (SHAPE + "y = Max (e, z, s)", 2),
        (SHAPE + "m = Greater (z, s)\n y = Where (m, e, z)", 2),
        ("e = Expand (x, eight)\n y = Mul (z, e)", 2),
        (SHAPE + "y = PRelu (z, e)", 2),
        ("e = Expand (x, eight)\n y = Expand (e, more)", 3),
    ],
)
def test_the_reader_broadcasts(nodes: str, rank: int) -> None:
    done = check(model(nodes, rank=rank))
    assert done.count("Expand") == ("more" in nodes)
    assert done.changes == 1


@pytest.mark.parametrize(
    "nodes",
    [
        SHAPE + "y = Add (e, x)",
        SHAPE + "y = PRelu (e, z)",
        SHAPE + "y = Neg (e)",
        "e = Expand (x, five)\n y = Add (e, s)",
        SHAPE + "y = MatMul (e, w)",
    ],
)
def test_what_makes_the_result_larger_stays(nodes: str) -> None:
    proto = model(nodes, "float[N, 1] x, float[N, 8] z, float[8, 2] w")
    assert check(proto).changes == 0


def test_sizes_that_may_differ_stay() -> None:
    """Were both N and M above 1, the model would not run; but M may be 1."""
    proto = model(
        "t = Shape (z)\n e = Expand (x, t)\n y = Add (e, w)", "float[1] x, float[N] z, float[M] w", 1
    )
    assert check(proto).changes == 0


def test_an_expand_that_is_read_elsewhere_stays_for_the_others() -> None:
    done = check(model(SHAPE + "a = Add (e, z)\n b = Neg (e)\n y = Mul (a, b)"))
    assert done.count("Expand") == 1
    add = next(node for node in done.model.graph if node.op_type == "Add")
    assert add.inputs[0] is not None
    assert add.inputs[0].name == "x"


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    full = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3))
    shapes = [[size if data.draw(st.booleans()) else 1 for size in full] for _ in range(3)]
    x, target, z = (shape[data.draw(st.integers(0, len(shape))) :] for shape in shapes)
    kind = data.draw(st.sampled_from(["Add", "Sub", "Max", "Div"]))
    order = data.draw(st.permutations(["e", "z"]))
    nodes = [helper.make_node("Expand", ["x", "t"], ["e"]), helper.make_node(kind, order, ["y"])]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", x), ("z", z))]
    rank = max(map(len, (x, target, z)))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"q{axis}" for axis in range(rank)])
    held = [
        numpy_helper.from_array(
            onnx.numpy_helper.to_array(helper.make_tensor("t", 7, [len(target)], target)), "t"
        )
    ]
    graph = helper.make_graph(nodes, "g", inputs, [y], held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    check(onnx.shape_inference.infer_shapes(proto))
