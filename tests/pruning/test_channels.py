"""Cutting channels gives what zeros in their place give, whatever ties them together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, nodes, static_shape
from onnxopt.ledger import Ledger
from onnxopt.passes.prune.prune_channels import PruneChannels, channel_cut
from tests.pruning.nets import Net, assert_cut_is_exact, surveyed
from tests.support import execute, random_feeds, run_pass, sqnr, text_model

KINDS = ("residual", "concat", "split", "grouped", "depthwise", "gate", "shuffle", "pad", "slice")


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.sampled_from(["flatten", "pool", "places"]),
    st.sampled_from([0.3, 0.6, 0.9]),
)
def test_cutting_is_masking(seed: int, kinds: list[str], end: str, share: float) -> None:
    net = Net(seed)
    x, channels = net.conv("x", 3, 10), 10
    for kind in kinds:
        x, channels = net.block(kind, x, channels)
    if end == "flatten":
        x, size = net.op("Flatten", net.op("Relu", x)), channels * 64
    elif end == "pool":
        x, size = net.op("Flatten", net.op("GlobalAveragePool", x)), channels
    else:
        flat = net.op("Reshape", x, net.constant(np.array([0, channels, -1], np.int64)))
        x, size = net.heads(net.op("Transpose", flat, perm=[0, 2, 1]), channels, 4), channels
    y = net.op("MatMul", x, net.weight(size, 5))
    sizes = ("N", 64, 5) if end == "places" else ("N", 5)
    assert_cut_is_exact(net.model(y, ("N", 3, 8, 8), sizes), share, seed)


def test_all_that_is_tied_goes_together() -> None:
    net = Net(0)
    first = net.conv("x", 3, 10)
    second = net.conv(first, 10, 10)
    y = net.op("Flatten", net.op("GlobalAveragePool", net.op("Add", first, second)))
    _, structure = surveyed(net.model(net.op("MatMul", y, net.weight(10, 5)), ("N", 3, 8, 8), ("N", 5)))
    (group,) = structure.groups
    assert (len(group.channels), len(group.layers)) == (10, 2)


def test_heads_go_as_wholes() -> None:
    net = Net(0)
    y = net.heads("x", 16, 4)
    proto = net.model(y, ("N", 7, 16), ("N", 7, 16))
    _, structure = surveyed(proto)
    assert [(len(group.channels), group.width) for group in structure.groups] == [(4, 6)]
    cut_model = assert_cut_is_exact(proto)
    shapes = {static_shape(value) for value in cut_model.graph.initializers.values()}
    assert {(16, 12), (12,), (12, 16)} <= shapes


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Relu(a)", "is an output of the graph"),
        ("b = Softmax<axis=-1>(a)\n y = MatMul(b, v)", "are normalised together"),
        ("b = ReduceMax<axes=[1]>(a)\n y = MatMul(b, o)", "ReduceMax goes over them"),
        ("b = CumSum(a, one)\n y = MatMul(b, v)", "CumSum is not understood"),
        (
            "s = Shape(a)\n f = Cast<to=1>(s)\n b = ReduceSum(f)\n d = Mul(a, b)\n y = MatMul(d, v)",
            "their number is read by Shape",
        ),
        (
            "b = Slice(a, zero, end, one, two)\n y = MatMul(b, h)",
            "a Slice takes some of them in steps, or is computed at run time",
        ),
    ],
)
def test_what_stays_and_why(body: str, reason: str) -> None:
    constants = """float[2, 4] u = {1, 2, 3, 4, 5, 6, 7, 8}, float[4, 1] v = {1, 2, 3, 4},
        float[1, 1] o = {2}, float[2, 1] h = {1, 2},
        int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] end = {4}"""
    proto = text_model(f"agraph (float[N, 2] x) => (float y) <{constants}> {{ a = MatMul(x, u)\n {body} }}")
    _, structure = surveyed(proto)
    assert structure.groups == ()
    assert structure.pinned["a"].reason == reason


def test_a_budget_is_met_and_kept_at_the_second_time() -> None:
    net = Net(1)
    x = net.conv("x", 3, 32)
    for _ in range(3):
        x = net.op("Relu", net.conv(x, 32, 32))
    y = net.op("MatMul", net.op("Flatten", net.op("GlobalAveragePool", x)), net.weight(32, 5))
    proto = net.model(y, ("N", 3, 8, 8), ("N", 5))
    for one, left, most in (
        (PruneChannels(macs=0.5), "macs", 0.5),
        (PruneChannels(parameters=0.4), "parameters", 0.4),
        (PruneChannels(), "macs", 0.5),
    ):
        done = run_pass(proto, one)
        found = channel_cut(done.model)
        assert found is not None
        share = getattr(found, f"{left}_after") / getattr(found, left)
        assert 0.3 < share <= most
        assert all(group.channels_after % 8 == 0 for group in found.groups)


def test_what_cannot_be_reached_is_declined() -> None:
    done = run_pass(PruneChannels.example, PruneChannels(macs=0.01))
    assert done.changes == 0
    assert (
        done.declined[-1]
        == "0.01 of the multiply-accumulates cannot be reached: 0.250 is left at the least of all groups"
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"macs": 0.5, "ratio": 0.5}, "macs and ratio both say how much"),
        ({"macs": 1.5}, "macs is 1.5; expected a fraction between 0 and 1"),
        ({"multiple": 0}, "multiple=0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        PruneChannels(**options)  # type: ignore[arg-type]


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown score 'l3'"):
        PruneChannels(score="l3").apply(ir.from_proto(text_model(PruneChannels.example)), Ledger())


def test_kept_layers_and_scores_of_the_user() -> None:
    proto = text_model(PruneChannels.example)
    done = run_pass(proto, PruneChannels(keep=("a",)))
    assert (done.changes, done.declined[-1]) == (0, "no channels can be cut")
    done = run_pass(
        proto, PruneChannels(ratio=0.5, multiple=1, scored=lambda _, group: np.array([3.0, 1, 4, 2]))
    )
    left = next(constant_array(node.inputs[1]) for node in nodes(done.model) if node.op_type == "MatMul")
    assert left is not None
    np.testing.assert_array_equal(left, [[1, 2], [3, -1]])


def test_layers_that_are_not_understood_are_listed() -> None:
    text = """agraph (float[N, 2] x) => (float y)
        <float[2, 4] u = {1, 2, 3, 4, 5, 6, 7, 8}, float[4, 1] v = {1, 2, 3, 4}> {
        a = Einsum<equation = "ab,bc->ac">(x, u)
        y = MatMul(a, v) }"""
    structure = surveyed(text_model(text))[1]
    assert {site: pin.reason for site, pin in structure.pinned.items()} == {
        "a": "Einsum is not understood",
        "y": "is an output of the graph",
    }


def test_behind_an_operator_of_another_domain_layers_count_as_much_as_their_axes_say() -> None:
    """onnx infers no shape of it, so that no size of a batch is known."""
    net = Net(0)
    scaled = net.op("Scaler", "x", scale=[1.0] * 6, offset=[0.0] * 6, domain="ai.onnx.ml")
    hidden = net.op("Relu", net.op("MatMul", scaled, net.weight(6, 16)))
    hidden = net.op("Relu", net.op("MatMul", hidden, net.weight(16, 4)))
    proto = net.model(net.op("MatMul", hidden, net.weight(4, 5)), ("N", 6), ("N", 5))
    structure = surveyed(proto)[1]
    assert [len(group.channels) for group in structure.groups] == [16, 4]
    assert structure.macs() == 6 * 16 + 16 * 4 + 4 * 5
    assert_cut_is_exact(proto)


def reconstructed(proto: onnx.ModelProto, samples: Sequence[Feeds], score: str = "l2") -> tuple[float, float]:
    """The SQNR after half the channels are gone: with weights as they were, and fitted to samples."""
    found = []
    for known in (None, samples):
        done = run_pass(proto, PruneChannels(ratio=0.5, multiple=1, score=score, samples=known), rounds=2)
        (want,), (have,) = execute(proto, samples[-1]), execute(done.model, samples[-1])
        found.append(sqnr(want, have))
    return found[0], found[1]


def test_layers_make_up_for_channels_that_others_can_tell() -> None:
    """Of 16 channels that are mixtures of 4, half are nothing to lose."""
    rng, net = np.random.default_rng(0), Net(0)
    mixed = rng.standard_normal((16, 4)) @ rng.standard_normal((4, 3 * 9))
    weight = net.constant(mixed.reshape(16, 3, 3, 3).astype(np.float32))
    y = net.conv(net.op("Conv", "x", weight, pads=[1] * 4), 16, 5)
    proto = net.model(y, ("N", 3, 8, 8), ("N", 5, 8, 8))
    samples = [random_feeds(proto, seed, {"N": 8}) for seed in range(4)]
    before, after = reconstructed(proto, samples)
    assert before < 10
    assert after > 60


def test_products_that_are_scaled_are_not_fitted() -> None:
    net = Net(0)
    hidden = net.op("MatMul", "x", net.weight(6, 16))
    y = net.op("Gemm", hidden, net.weight(16, 5), net.weight(5), alpha=0.25)
    found = fitted_and_not(net.model(y, ("N", 6), ("N", 5)))
    np.testing.assert_array_equal(found[1][0], found[2][0])


def test_a_bias_that_is_an_output_stays() -> None:
    net = Net(0)
    hidden, bias = net.op("MatMul", "x", net.weight(6, 16)), net.weight(5)
    proto = net.model(net.op("Gemm", hidden, net.weight(16, 5), bias), ("N", 6), ("N", 5))
    proto.graph.output.append(helper.make_tensor_value_info(bias, TensorProto.FLOAT, [5]))
    whole, fitted, plain = fitted_and_not(proto)
    np.testing.assert_array_equal(whole[1], fitted[1])
    assert sqnr(whole[0], fitted[0]) > sqnr(whole[0], plain[0])


def fitted_and_not(proto: onnx.ModelProto) -> list[list[np.ndarray]]:
    """What a model gives, and what it gives without half its channels, fitted to samples and not."""
    samples = [random_feeds(proto, seed, {"N": 64}) for seed in range(2)]
    cut = (
        run_pass(proto, PruneChannels(ratio=0.5, multiple=1, score="l2", samples=known)).model
        for known in (samples, None)
    )
    return [execute(proto, samples[0]), *(execute(one, samples[0]) for one in cut)]


def test_all_layers_that_are_fitted_are_checked() -> None:
    """The last one is, though it reads and writes no channels that go."""
    net = Net(0)
    x = net.op("Relu", net.op("Conv", "x", net.weight(16, 3, 1, 1)))
    x = net.op("Softmax", net.op("Conv", x, net.weight(8, 16, 1, 1)), axis=1)
    y = net.op("Conv", x, net.weight(4, 8, 1, 1))
    proto = net.model(y, ("N", 3, 8, 8), ("N", 4, 8, 8))
    model, ledger = ir.from_proto(proto), Ledger(pass_name=PruneChannels.name)
    PruneChannels(ratio=0.5, samples=[random_feeds(proto)]).apply(model, ledger)
    last = next(node for node in model.graph if node.outputs[0].name == y)
    assert len(last.inputs) == 3
    assert last in ledger.touched


@pytest.mark.parametrize(("ratio", "left"), [(0.9, 1), (0.7, 3), (0.3, 7)])
def test_shares_that_binary_fractions_only_come_near_are_met(ratio: float, left: int) -> None:
    net = Net(0)
    hidden = net.op("Relu", net.op("MatMul", "x", net.weight(6, 10)))
    proto = net.model(net.op("MatMul", hidden, net.weight(10, 5)), ("N", 6), ("N", 5))
    found = channel_cut(run_pass(proto, PruneChannels(ratio=ratio, multiple=1)).model)
    assert found is not None
    assert [group.channels_after for group in found.groups] == [left]
