"""merge-distant-layout against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxopt.graph import constant_array
from onnxopt.passes.merge.merge_distant_layout import MergeDistantLayout
from tests.passes.movements import Movements
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

HELD = """float[3] c = {1, 2, 3}, float[1] one = {4}, float s = {0.5}, bool yes = {1},
  float[5, 5] m = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 5, 4, 3, 2, 1},
  int64[1] k0 = {0}, int64[1] k1 = {1}, int64[1] k2 = {2}, int64[2] k0k1 = {0, 1}, int64[2] k2k3 = {2, 3},
  int64[1] last = {-1}, int64[2] axes = {3, -3}, int64[2] pick = {2, 0}, int64 first = {0},
  int64[8] pads = {0, 1, 0, 0, 0, 0, 2, 0}, int64[2] flat = {-1, 5}, int64[4] full = {-1, 3, 4, 5},
  int64[2] rows = {-1, 4}, int64[2] k1k3 = {1, 3}, int64[2] k3k1 = {3, 1}, int64[4] mixed = {1, 6, 1, 5}"""
TO = "Transpose <perm = [0, 2, 3, 1]>"
SUM = "f = ReduceMax (e)\n y = Add (d, f)"
BACK = "Transpose <perm = [0, 3, 1, 2]>"


def model(nodes: str, rank: int = 4, shape: str = "N, 3, 4, 5", opset: int = 17) -> onnx.ModelProto:
    result = ", ".join(f"q{axis}" for axis in range(rank))
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
      agraph (float[{shape}] x, float[{shape}] z) => (float[{result}] y) <{HELD}> {{ {nodes} }}"""
    return onnx.shape_inference.infer_shapes(text_model(text))


def check(proto: onnx.ModelProto) -> Rewritten:
    done = run_pass(proto, MergeDistantLayout())
    assert_equivalent(
        proto, done.model, [random_feeds(proto, sizes={"N": n}) for n in (2, 1)], kind="reorder"
    )
    return done


@pytest.mark.parametrize(
    "middle",
    [
        ["Relu ({})"],
        ["Relu ({})", "Clip ({}, s)", "Cast <to = 1> ({})"],
        ["Add ({}, c)"],
        ["Add (c, {})", "Mul (s, {})", "Sub ({}, one)"],
        ["PRelu ({}, c)"],
        ["Where (yes, {}, c)"],
        ["Softmax <axis = -1> ({})"],
        ["LogSoftmax <axis = 1> ({})"],
        ["Slice ({}, k1, k2, last)"],
        ["Slice ({}, k0k1, k2k3, axes)"],
        ["Pad ({}, pads)"],
        ['Pad <mode = "reflect"> ({}, pads)'],
        ["Gather <axis = 3> ({}, pick)"],
        ["Gather <axis = -3> ({}, pick)"],
        ["ReduceMean <axes = [1, 2]> ({})"],
        ["ReduceMax <axes = [-1]> ({})"],
        ["ReduceSum ({}, axes)"],
        ["ReduceSum ({})"],
        ["ReduceL2 ({})", "Sqrt ({})"],
    ],
)
def test_pair_cancels(middle: list[str]) -> None:
    """A Transpose in front, its inverse behind."""
    nodes, value = f"a = {TO} (x)\n", "a"
    for number, text in enumerate(middle):
        nodes += f"b{number} = {text.format(value)}\n"
        value = f"b{number}"
    assert len(check(model(f"{nodes} y = {BACK} ({value})")).op_types) == len(middle)


@pytest.mark.parametrize(
    ("nodes", "rank", "left"),
    [
        # branches with the same change of layout join
        (f"a = {TO} (x)\n b = {TO} (z)\n y = Add (a, b)", 4, ["Add", "Transpose"]),
        (f"a = {TO} (x)\n b = {TO} (z)\n y = Concat <axis = 3> (a, b)", 4, ["Concat", "Transpose"]),
        (f"a = {TO} (x)\n b = {TO} (z)\n d = Relu (b)\n e = Mul (a, d)\n y = {BACK} (e)", 4, 2),
        (f"a = {TO} (x)\n e = Mul (a, a)\n y = {BACK} (e)", 4, ["Mul"]),
        # what has ones where the other is broadcast
        (f"a = {TO} (x)\n b = ReduceMean <axes = [1, 2]> (a)\n d = Sub (a, b)\n y = {BACK} (d)", 4, 2),
        # Reduce takes the place of a Transpose, or keeps its axes
        (f"a = {TO} (x)\n y = ReduceMax <axes = [1, 2], keepdims = 0> (a)", 2, ["ReduceMax"]),
        ("a = ReduceSum <keepdims = 0> (x, k1)\n y = Unsqueeze (a, k1)", 4, ["ReduceSum"]),
        ("a = ReduceMean <keepdims = 0, axes = [1]> (x)\n b = Relu (a)\n y = Unsqueeze (b, k1)", 4, 2),
        ("a = ReduceMax <axes = [1, 3]> (x)\n y = Squeeze (a, axes)", 2, ["ReduceMax"]),
        # MatMul with a matrix
        ("a = Unsqueeze (x, k0)\n b = MatMul (a, m)\n y = Squeeze (b, k0)", 4, ["MatMul"]),
        ("a = Reshape (x, flat)\n b = MatMul (a, m)\n d = Add (b, s)\n y = Reshape (d, full)", 4, 2),
        # a Gather of ids; of one element, whose axis goes
        ("a = Unsqueeze (x, k1)\n b = Gather <axis = 4> (a, pick)\n y = Squeeze (b, k1)", 4, ["Gather"]),
        (f"a = {TO} (x)\n y = Gather <axis = 3> (a, first)", 3, ["Gather"]),
    ],
)  # fmt: skip
def test_rows(nodes: str, rank: int, left: list[str] | int) -> None:
    """`left` are operators, or how many."""
    done = check(model(nodes, rank))
    assert (len(done.op_types) if isinstance(left, int) else sorted(done.op_types)) == left


@pytest.mark.parametrize(
    ("first", "second", "fired"),
    [
        ("Transpose <perm = [1, 0, 3, 2]> ({})", "Transpose <perm = [1, 0, 3, 2]> ({})", True),
        ("Unsqueeze ({}, k0)", "Unsqueeze ({}, k0)", True),
        ("Unsqueeze ({}, k0)", "Unsqueeze ({}, k1)", False),
        ("Transpose <perm = [1, 0, 3, 2]> ({})", "Relu ({})", False),
        ("Reshape ({}, flat)", "Reshape ({}, flat)", False),  # the axis that is split is joined with others
    ],
)
@pytest.mark.parametrize("sizes", ["k1k3", "k3k1"])
def test_split_in_front(first: str, second: str, fired: bool, sizes: str) -> None:
    proto = model(
        f"a, b = Split <axis = 2> (x, {sizes})\n y = {first.format('a')}\n d = {second.format('b')}"
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, None))
    done = check(proto)
    assert len(done.op_types) == 3 - fired


def test_channel_shuffle_needs_no_transpose() -> None:
    """Two halves interleaved: [1, 3, 1, 5] each, stacked, transposed and flattened."""
    nodes = """a = Unsqueeze (x, k1)
      b = Unsqueeze (z, k1)
      d = Concat <axis = 1> (a, b)
      e = Transpose <perm = [0, 2, 1, 3, 4]> (d)
      y = Reshape (e, mixed)"""
    assert check(model(nodes, shape="1, 3, 1, 5")).op_types == ["Concat", "Reshape"]


def test_residual_blocks_lose_all_but_the_last_transpose() -> None:
    """Each value between two blocks is read twice: by the next block, turned back, and by the Add."""
    blocks = f"a = Conv (x, kernel)\n b = {TO} (a)\n r0 = Relu (b)\n"
    for number in range(3):
        blocks += f"""t{number} = {BACK} (r{number})
          c{number} = Conv (t{number}, kernel)
          d{number} = {TO} (c{number})
          e{number} = Add (r{number}, d{number})
          r{number + 1} = Relu (e{number})\n"""
    proto = model(f"{blocks} y = {BACK} (r3)")
    kernel = np.random.default_rng(0).standard_normal((3, 3, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
    proto = onnx.shape_inference.infer_shapes(proto)
    done = check(proto)
    assert done.count("Transpose") == 0


def test_constants_are_turned_once_each() -> None:
    done = check(model(f"a = {TO} (x)\n b = Add (a, c)\n y = {BACK} (b)"))
    array = constant_array(done.model.graph.node(0).inputs[1])
    assert array is not None
    assert array.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(
    "nodes",
    [
        f"a = {TO} (x)\n b = Relu (a)\n y = Transpose <perm = [0, 1, 3, 2]> (b)",
        f"a = {TO} (x)\n y = Relu (a)",
        f"a = {TO} (x)\n b = CumSum (a, first)\n y = {BACK} (b)",
        "a = Reshape (x, flat)\n b = Softmax <axis = -1> (a)\n y = Reshape (b, full)",
        "a = Reshape (x, rows)\n b = ReduceMax <axes = [1]> (a)\n y = Reshape (b, k2)",
        f"a = {TO} (x)\n b = Relu (a)\n d = {BACK} (b)\n e = CumSum (b, first)\n {SUM}",
    ],
)
def test_gain_or_nothing(nodes: str) -> None:
    proto = model(nodes)
    before = len(proto.graph.node)
    done = run_pass(proto, MergeDistantLayout())
    assert len(done.op_types) <= before
    assert run_pass(proto, MergeDistantLayout()).op_types == done.op_types


@pytest.mark.parametrize("opset", [10, 11, 12, 13, 17, 18])
def test_forms_of_the_opset(opset: int) -> None:
    slices = "b = Slice (a, k1, k2, last)"
    reduce = "d = ReduceMean (b, axes)" if opset >= 18 else "d = ReduceMean <axes = [3, -3]> (b)"
    total = "e = ReduceSum (d, k2)" if opset >= 13 else "e = ReduceSum <axes = [2]> (d)"
    done = check(model(f"a = {TO} (x)\n {slices}\n {reduce}\n {total}\n y = {BACK} (e)", opset=opset))
    assert done.count("Transpose") == 0


def test_reference_attributes_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    agraph (float[2, 3, 4] x) => (float[a, b, c] y) { y = my.act <axis = 2> (x) }
    <domain: "my", opset_import: ["" : 17]> act <axis> (x) => (y) {
      a = Transpose <perm = [1, 0, 2]> (x)
      b = Softmax <axis: int = @axis> (a)
      y = Transpose <perm = [1, 0, 2]> (b)
    }"""
    assert run_pass(text, MergeDistantLayout()).changes == 0


def test_in_a_body() -> None:
    text = f"""agraph (float[2, 3, 4, 5] x, bool flag) => (float[a, b, c, d] y) <float[3] c = {{1, 2, 3}}> {{
      y = If (flag) <
        then_branch = t () => (float[a, b, c, d] u) {{ k = {TO} (x)  m = Add (k, c)  u = {BACK} (m) }},
        else_branch = e () => (float[a, b, c, d] v) {{ v = Neg (x) }}>
    }}"""
    proto = onnx.shape_inference.infer_shapes(text_model(text))
    done = run_pass(proto, MergeDistantLayout())
    assert done.op_types == ["If", "Add", "Neg"]
    x = np.ones((2, 3, 4, 5), np.float32)
    assert_equivalent(proto, done.model, [{"x": x, "flag": np.array(flag)} for flag in (True, False)])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    """Changes of layout among other ops, with values read once or more often."""
    proto = Movements(data).model("TTTRRRucpCrsSG", 9)
    assume(proto is not None)
    assert proto is not None
    done = run_pass(proto, MergeDistantLayout(), rounds=8)
    assert len(done.op_types) <= len(proto.graph.node)
    assert_equivalent(proto, done.model, kind="reorder")


def test_a_constant_without_axes_stays_one() -> None:
    proto = text_model(
        """agraph (float x) => (float[1] y) <int64[2] both = {0, 1}, int64[1] last = {1}, float[1] c = {2}> {
            a = Unsqueeze (x, both)
            b = Mul (a, c)
            y = Squeeze (b, last)
        }"""
    )
    assert check(onnx.shape_inference.infer_shapes(proto)).op_types == ["Mul", "Unsqueeze"]
