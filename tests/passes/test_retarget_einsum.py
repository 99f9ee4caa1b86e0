"""retarget-einsum against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.retarget.retarget_einsum import RetargetEinsum
from tests.support import Rewritten, assert_equivalent, execute, random_feeds, run_pass

SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "k": 6, "d": 7}


def model(equation: str, *, held: int | None = None, opset: int = 17, names: bool = False) -> onnx.ModelProto:
    """An Einsum; input `held` is a constant; `names` instead of numbers as sizes."""
    left, _, result = equation.partition("->")
    terms = left.split(",")
    rng, inputs, constants = np.random.default_rng(0), [], []
    for number, term in enumerate(terms):
        sizes = [SIZES[letter] for letter in term if letter in SIZES]
        if number == held:
            constants.append(
                numpy_helper.from_array(rng.standard_normal(sizes).astype(np.float32), f"x{number}")
            )
        else:
            dims = [letter if names else SIZES[letter] for letter in term if letter in SIZES]
            inputs.append(helper.make_tensor_value_info(f"x{number}", TensorProto.FLOAT, dims))
    node = helper.make_node(
        "Einsum", [f"x{number}" for number in range(len(terms))], ["y"], equation=equation
    )
    rank = sum(letter in SIZES for letter in result)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"q{axis}" for axis in range(rank)])
    graph = helper.make_graph([node], "g", inputs, [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def check(proto: onnx.ModelProto, most: int = 3) -> Rewritten:
    done = run_pass(proto, RetargetEinsum(most=most))
    assert_equivalent(proto, done.model, random_feeds(proto, sizes=SIZES), kind="reorder")
    return done


@pytest.mark.parametrize(
    ("equation", "left"),
    [
        ("ij->ij", []),
        ("ij->ji", ["Transpose"]),
        ("bij->bj", ["ReduceSum"]),
        ("bij->jb", ["ReduceSum", "Transpose"]),
        ("ij,jk->ik", ["MatMul"]),
        ("ij,kj->ik", ["Transpose", "MatMul"]),
        ("bhid,bhdj->bhij", ["MatMul"]),
        ("bhid,bhjd->bhij", ["Transpose", "MatMul"]),
        ("bhjd,bhid->bhij", ["Transpose", "MatMul"]),
        ("bij,jk->bik", ["MatMul"]),
        ("jk,bij->bik", ["MatMul"]),
        ("ij,jk->ki", ["MatMul", "Transpose"]),
        ("bij,bij->bij", ["Mul"]),
        ("bij,j->bij", ["Mul"]),
        ("bij,b->bij", ["Unsqueeze", "Mul"]),
        ("i,j->ij", ["Unsqueeze", "Mul"]),
        ("ij,ji->ij", ["Transpose", "Mul"]),
        ("bid,dhk->bihk", ["Reshape", "MatMul", "Reshape"]),
        ("bihk,hkd->bid", ["Reshape", "Reshape", "MatMul"]),
        ("ij,jk", ["MatMul"]),
        (" ij , jk -> ik ", ["MatMul"]),
    ],
)
@pytest.mark.parametrize("names", [False, True])
def test_equations(equation: str, left: list[str], names: bool) -> None:
    if "->" not in equation:
        proto = model(equation + "->ik")
        proto.graph.node[0].attribute[0].s = equation.encode()
    else:
        proto = model(equation, names=names)
    done = check(proto)
    assert sorted(done.op_types) == sorted(left) or (not left and done.op_types == ["Einsum"]) or names


@pytest.mark.parametrize(("equation", "left"), [("bid,dhk->bihk", 2), ("ij,kj->ik", 1), ("ij,jk->ki", 1)])
def test_constants_are_rearranged_for_free(equation: str, left: int) -> None:
    assert len(check(model(equation, held=1)).op_types) <= left + ("ki" in equation)


@pytest.mark.parametrize("opset", [12, 13])
def test_forms_of_the_opset(opset: int) -> None:
    assert check(model("bij->bj", opset=opset)).op_types == ["ReduceSum"]
    assert check(model("bij,b->bij", opset=opset)).count("Einsum") == 0


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("ij,jk,kd->id", "more than two inputs, or axes that are not named"),
        ("...ij,...jk->...ik", "more than two inputs, or axes that are not named"),
        ("ii->i", "an index is repeated in one input, or its shape is not known"),
        ("ij,kd->ik", "an index of one input alone is summed"),
        ("ihbd,jhbd->jhbi", "it takes more nodes than are allowed"),
    ],
)
def test_declined(equation: str, reason: str) -> None:
    done = check(model(equation))
    assert done.declined == (reason,)


def test_sizes_have_to_be_the_same() -> None:
    """An index of size 1 would be broadcast."""
    proto = model("ij,jk->ik", names=True)
    proto.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "other"
    assert run_pass(proto, RetargetEinsum()).declined == ("the sizes of an index are not surely the same",)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_any_equation(data: st.DataObject) -> None:
    letters = st.lists(st.sampled_from("bhijk"), unique=True, min_size=1, max_size=4)
    terms = ["".join(data.draw(letters)) for _ in range(data.draw(st.integers(1, 2)))]
    every = sorted(set("".join(terms)))
    kept = [letter for letter in data.draw(st.permutations(every)) if data.draw(st.integers(0, 2))]
    proto = model(f"{','.join(terms)}->{''.join(kept)}", held=data.draw(st.sampled_from([None, 1])))
    assume(bool(proto.graph.input))
    try:
        execute(proto, random_feeds(proto))
    except Exception:  # ONNX Runtime's classes have no common base below Exception
        assume(False)
    check(proto, most=8)
