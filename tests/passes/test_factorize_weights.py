"""Weights as products of two, held against the runtime and against the truncated decomposition itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, ints_attr, nodes
from onnxopt.inspection.costs import macs_of, sizes_read
from onnxopt.inspection.sizes import sized
from onnxopt.passes.factorize.factorize_weights import FactorizeWeights
from tests.support import (
    Rewritten,
    assert_equivalent,
    execute,
    random_feeds,
    run_pass,
    sqnr,
    text_model,
)

RNG = np.random.default_rng(0)
FLOAT = onnx.TensorProto.FLOAT


def low_rank(outputs: int, inputs: int, rank: int) -> np.ndarray:
    """A matrix of that rank, [outputs, inputs]."""
    rng = np.random.default_rng(rank)
    product: np.ndarray = rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, inputs))
    return product


def layer(
    op_type: str,
    weight: np.ndarray,
    x: tuple[int | str, ...],
    y: tuple[int | str | None, ...],
    bias: int = 0,
    dtype: int = FLOAT,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one layer."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {"w": weight.astype(kind)}
    if bias:
        constants["b"] = RNG.standard_normal(bias).astype(kind)
    node = helper.make_node(op_type, ["x", *constants], ["y"], name="layer", **attributes)
    value = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "g", [value("x", dtype, x)], [value("y", dtype, y)], tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def macs(model: Any) -> int:
    found = sized(model, None, sizes_read)
    return macs_of(found.graph, found.shapes).weight


def shapes_of(done: Rewritten) -> list[tuple[int, ...]]:
    return [
        array.shape for node in nodes(done.model) if (array := constant_array(node.inputs[1])) is not None
    ]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(
    ("op_type", "attributes", "bias"),
    [
        ("MatMul", {}, 0),
        ("Gemm", {"alpha": 0.5, "beta": 2.0}, 40),
        ("Gemm", {"transB": 1}, 0),
        ("Gemm", {"transB": 1, "alpha": -2.0}, 40),
    ],
)
def test_a_matrix_of_low_rank_becomes_a_product(
    op_type: str, attributes: dict[str, Any], bias: int, multiple: int
) -> None:
    weight = low_rank(40, 48, 5)
    lead: tuple[int | str, ...] = ("N", 3) if op_type == "MatMul" else ("N",)
    stored = weight if "transB" in attributes else weight.T
    proto = layer(op_type, stored, (*lead, 48), (*lead, 40), bias, **attributes)
    done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9, multiple=multiple))
    assert done.op_types == ["MatMul", op_type]
    assert shapes_of(done)[0] == (48, 5 if multiple == 1 else 8)
    assert_equivalent(proto, done.model, kind="reorder")


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_convolution_of_low_rank_is_the_same_in_whatever_way_it_is_written(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    along = tuple(data.draw(st.booleans()) for _ in range(rank))
    inputs, outputs = data.draw(st.integers(3, 8)), data.draw(st.integers(3, 8))
    early = [k for k, one in zip(kernel, along, strict=True) if one]
    late = [k for k, one in zip(kernel, along, strict=True) if not one]
    matrix = low_rank(inputs * int(np.prod(early)), outputs * int(np.prod(late)), 1)
    order = [
        1,
        *(a for a, one in enumerate(along, 2) if one),
        0,
        *(a for a, one in enumerate(along, 2) if not one),
    ]
    weight = matrix.reshape(inputs, *early, outputs, *late).transpose(np.argsort(order))
    attributes: dict[str, Any] = {"strides": [data.draw(st.integers(1, 3)) for _ in kernel]}
    attributes["dilations"] = [data.draw(st.integers(1, 2)) for _ in kernel]
    mode = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    assume(not mode.startswith("SAME") or max(attributes["dilations"]) == 1)
    pads = [data.draw(st.integers(0, 2)) for _ in range(2 * rank)]
    attributes |= {"pads": pads} if mode == "NOTSET" else {"auto_pad": mode}
    sizes = tuple(data.draw(st.integers(5, 9)) for _ in kernel)
    known = data.draw(st.booleans())
    proto = layer("Conv", weight, (2, inputs, *sizes), (None,) * (2 + rank), outputs, **attributes)
    want = execute(proto, random_feeds(proto))[0]
    if known:
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, want.shape))
    done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9))
    if done.changes:
        assert done.op_types == ["Conv", "Conv"]
        assert_equivalent(proto, done.model, kind="reorder")
        if known:
            assert macs(done.model) <= macs(ir.from_proto(proto)) * 0.9
    else:
        assert done.declined == ("less than a tenth of the multiply-adds would be saved",)


def test_what_a_matrix_keeps_is_what_its_singular_values_say() -> None:
    weight = np.random.default_rng(3).standard_normal((60, 50)) * np.linspace(2, 0.1, 50) ** 3
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    kept = np.cumsum(s**2) / np.sum(s**2)
    for energy in (0.7, 0.9, 0.95):
        rank = 1 + int(np.argmax(kept >= energy))
        assert rank < 22  # 0.9 of 60 * 50 / 110
        proto = layer("MatMul", weight.T, (3, 50), (3, 60))
        done = run_pass(proto, FactorizeWeights(energy=energy, multiple=1))
        assert shapes_of(done) == [(50, rank), (rank, 60)]
        feeds = random_feeds(proto)
        want = feeds["x"] @ (v[:rank].T * s[:rank]) @ u[:, :rank].T
        assert sqnr(want, execute(done.model, feeds)[0]) > 100


def test_samples_tell_which_directions_matter() -> None:
    """A weight without structure, on inputs that lie in 6 of 48 directions away from their mean."""
    rng = np.random.default_rng(5)
    weight, basis, mean = rng.standard_normal((48, 40)), rng.standard_normal((6, 48)), rng.standard_normal(48)
    samples: list[Feeds] = [
        {"x": (rng.standard_normal((32, 6)) @ basis + mean).astype(np.float32)} for _ in range(8)
    ]
    for op_type, bias in (("MatMul", 0), ("Gemm", 0), ("Gemm", 40)):
        proto = layer(op_type, weight, ("N", 48), ("N", 40), bias)
        assert not run_pass(proto, FactorizeWeights(energy=0.9)).changes
        done = run_pass(proto, FactorizeWeights(energy=0.98, multiple=1, samples=samples))
        assert shapes_of(done)[0][1] == 6
        assert sqnr(execute(proto, samples[0])[0], execute(done.model, samples[0])[0]) > 25


def test_samples_that_run_a_branch_tell_which_directions_matter_there() -> None:
    rng = np.random.default_rng(5)
    weight, basis = rng.standard_normal((48, 40)), rng.standard_normal((6, 48))
    proto = layer("MatMul", weight, ("N", 48), ("N", 40), 0)
    body = helper.make_graph(list(proto.graph.node), "yes", [], proto.graph.output)
    other = helper.make_node("ReduceSum", ["x"], ["r"], keepdims=1)
    add = helper.make_node("Add", ["r", "row"], ["z"])
    row = numpy_helper.from_array(np.zeros((1, 40), np.float32), "row")
    ends = [helper.make_tensor_value_info("z", 1, ["N", 40])]
    no = helper.make_graph([other, add], "no", [], ends, [row])
    del proto.graph.node[:]
    proto.graph.node.append(
        helper.make_node("If", ["c"], [proto.graph.output[0].name], then_branch=body, else_branch=no)
    )
    proto.graph.input.append(helper.make_tensor_value_info("c", 9, []))
    samples: list[Feeds] = [
        {"x": (rng.standard_normal((32, 6)) @ basis).astype(np.float32), "c": np.array(True)}
        for _ in range(8)
    ]
    done = run_pass(proto, FactorizeWeights(energy=0.98, multiple=1, samples=samples))
    assert done.changes == 1
    assert sqnr(execute(proto, samples[0])[0], execute(done.model, samples[0])[0]) > 25
    unseen = [{**feeds, "c": np.array(False)} for feeds in samples]
    assert not run_pass(proto, FactorizeWeights(energy=0.9, multiple=1, samples=unseen)).changes


def test_a_convolution_on_samples_keeps_its_bias_and_the_variance_asked_for() -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((24, 16, 3, 3))
    smooth = np.cumsum(np.cumsum(rng.standard_normal((6, 1, 16, 12, 12)), -1), -2) + 10
    samples: list[Feeds] = [{"x": one.astype(np.float32)} for one in smooth]
    for pads in ([1, 1, 1, 1], [0, 1, 2, 0]):
        proto = layer("Conv", weight, (1, 16, 12, 12), (1, 24, None, None), 24, pads=pads)
        done = run_pass(proto, FactorizeWeights(energy=0.95, samples=samples))
        assert done.op_types == ["Conv", "Conv"]
        want, have = (
            np.concatenate([execute(one, feeds)[0] for feeds in samples]) for one in (proto, done.model)
        )
        lost = want - have
        assert abs(lost.mean((0, 2, 3))).max() < 1e-2 * want.std()
        centred = want - want.mean((0, 2, 3), keepdims=True)
        assert np.sum(lost**2) < 0.0501 * np.sum(centred**2)


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.3])
def test_a_budget_is_met_with_the_largest_energy(fraction: float) -> None:
    rng = np.random.default_rng(7)
    proto = layer("Conv", rng.standard_normal((32, 32, 3, 3)), (1, 32, 8, 8), (1, 32, 8, 8), 32, pads=[1] * 4)
    proto.graph.node.extend(
        [helper.make_node("Relu", ["y"], ["a"]), helper.make_node("Conv", ["a", "v"], ["z"])]
    )
    proto.graph.initializer.append(
        numpy_helper.from_array(low_rank(64, 32, 20).reshape(64, 32, 1, 1).astype(np.float32), "v")
    )
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", FLOAT, (1, 64, 8, 8)))
    done = run_pass(proto, FactorizeWeights(macs=fraction, multiple=1))
    share = macs(done.model) / macs(ir.from_proto(proto))
    assert fraction * 0.9 < share <= fraction


def test_a_budget_that_no_rank_meets() -> None:
    proto = layer("MatMul", low_rank(40, 40, 40), (3, 40), (3, 40))
    with pytest.raises(UsageError, match=r"macs is 0.01, but the smallest ranks leave 0.050 of"):
        run_pass(proto, FactorizeWeights(macs=0.01, multiple=1))


FULL = np.eye(40)
CONV = low_rank(32, 8, 1).reshape(32, 8, 1, 1)
SAVES = "less than a tenth of the multiply-adds would be saved"


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (layer("MatMul", FULL, (3, 40), (3, 40)), SAVES),
        (layer("MatMul", np.zeros((1, 1)), (3, 1), (3, 1)), SAVES),
        (layer("Conv", CONV, (1, 16, 5, 5), (1, 32, 5, 5), group=2), "the convolution has groups"),
        (layer("Gemm", FULL, (40, 3), (3, 40), transA=1), "the Gemm transposes what it reads"),
        (layer("MatMul", np.full((9, 9), np.nan), (3, 9), (3, 9)), "the weight is not finite"),
        (
            layer("MatMul", np.ones((2, 9, 9)), (2, 3, 9), (2, 3, 9)),
            "the weight of the MatMul has rank 3 or is empty",
        ),
        (
            layer("MatMul", np.ones((99, 99)) * 60000, (3, 99), (3, 99), dtype=onnx.TensorProto.FLOAT16),
            "the folded constants would not be finite in FLOAT16",
        ),
    ],
)
def test_what_is_declined(proto: onnx.ModelProto, reason: str) -> None:
    done = run_pass(proto, FactorizeWeights())
    assert (done.changes, done.declined) == (0, (reason,))


def test_a_bias_of_run_time_has_nowhere_to_put_the_mean() -> None:
    proto = layer("Gemm", low_rank(40, 40, 2), (3, 40), (3, 40))
    proto.graph.node[0].input.append("c")
    proto.graph.input.append(helper.make_tensor_value_info("c", FLOAT, (40,)))
    samples = [random_feeds(proto)]
    assert run_pass(proto, FactorizeWeights()).changes == 1
    done = run_pass(proto, FactorizeWeights(samples=samples))
    assert done.declined == ("the bias is computed at run time",)


def test_a_weight_that_the_user_may_override_stays() -> None:
    proto = layer("MatMul", low_rank(40, 40, 1), (3, 40), (3, 40))
    proto.graph.input.append(helper.make_tensor_value_info("w", FLOAT, (40, 40)))
    done = run_pass(proto, FactorizeWeights())
    assert done.declined == ("the weight is a graph input (overridable; --freeze-initializers folds it)",)


def test_sizes_that_are_not_known_leave_what_costs_the_same_at_any() -> None:
    """1 x 1 first runs on the input's positions, which a stride makes more than those of the output."""
    weight = low_rank(64 * 9, 64, 4).reshape(64, 3, 3, 64).transpose(0, 3, 1, 2)
    shapes: tuple[tuple[int | str | None, ...], ...] = ((1, 64, "H", "W"), (1, 64, None, None))
    for strides, way in (([1, 1], (4, 64, 1, 1)), ([2, 2], (36, 64, 3, 3))):
        proto = layer("Conv", weight, shapes[0], shapes[1], pads=[1] * 4, strides=strides)  # type: ignore[arg-type]
        done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9, multiple=1))
        assert shapes_of(done)[0] == way
        assert_equivalent(proto, done.model, random_feeds(proto, sizes={"H": 7, "W": 9}), kind="reorder")


def test_float16_stays_float16() -> None:
    proto = layer("MatMul", low_rank(40, 40, 3) / 20, (3, 40), (3, 40), dtype=onnx.TensorProto.FLOAT16)
    done = run_pass(proto, FactorizeWeights(energy=0.9999))
    assert {
        array.dtype for node in nodes(done.model) if (array := constant_array(node.inputs[1])) is not None
    } == {np.dtype(np.float16)}
    assert sqnr(execute(proto, random_feeds(proto))[0], execute(done.model, random_feeds(proto))[0]) > 40


def test_the_stride_of_a_kernel_of_one_goes_first() -> None:
    proto = layer("Conv", low_rank(40, 40, 2)[..., None, None], (1, 40, 9, 9), (1, 40, 5, 5), strides=[2, 2])
    done = run_pass(proto, FactorizeWeights())
    assert [ints_attr(node, "strides") for node in nodes(done.model)] == [(2, 2), (1, 1)]
    assert Fraction(macs(done.model), macs(ir.from_proto(proto))) == Fraction(8 * 80, 1600)


def test_a_layer_in_a_branch_is_factorized_too() -> None:
    proto = layer("MatMul", low_rank(40, 40, 2), (3, 40), (3, 40))
    body = [helper.make_graph([node], "g", [], proto.graph.output) for node in proto.graph.node]
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y2"])],
        "e",
        [],
        [helper.make_tensor_value_info("y2", FLOAT, (3, 40))],
    )
    proto.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, ()))
    branch = helper.make_node("If", ["c"], ["z"], then_branch=body[0], else_branch=other)
    del proto.graph.node[:]
    proto.graph.node.append(branch)
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("z", FLOAT, (3, 40)))
    feeds = {"x": random_feeds(proto)["x"], "c": np.array(True)}
    done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9, samples=[feeds]))
    assert done.count("MatMul") == 2
    assert_equivalent(proto, done.model, feeds, kind="reorder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, r"energy is 0.0; expected a share, above 0"),
        ({"macs": 1.0}, r"macs is 1.0; expected the share that stays, below 1"),
        ({"multiple": 0}, r"multiple is 0; expected at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"factorize-weights: {message}"):
        FactorizeWeights(**options)


def test_a_budget_of_a_model_with_functions() -> None:
    weight = ", ".join(["1"] * 400)
    proto = text_model(f"""<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        m (float[3, 20] x) => (float[3, 20] y) <float[20, 20] w = {{{weight}}}> {{
            h = MatMul(x, w)
            y = my.twice(h)
        }}
        <domain: "my", opset_import: ["" : 17]> twice (a) => (b) {{ b = Add(a, a) }}""")
    assert run_pass(proto, FactorizeWeights()).count("MatMul") == 2
    with pytest.raises(UsageError, match="inline them first"):
        run_pass(proto, FactorizeWeights(macs=0.5))


def test_a_budget_of_sizes_that_are_not_known() -> None:
    proto = layer("MatMul", low_rank(40, 40, 40), (3, 40), (3, 40))
    proto.graph.input.append(helper.make_tensor_value_info("s", onnx.TensorProto.INT64, (None,)))
    proto.graph.node.insert(0, helper.make_node("Reshape", ["x", "s"], ["r"]))
    proto.graph.node[1].input[0] = "r"
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UsageError, match="sizes are not known: give an energy instead"):
        run_pass(proto, FactorizeWeights(macs=0.5))
