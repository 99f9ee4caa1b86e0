"""Heads of fused attention, and what else the runtime's operators and computed shapes tie: cut is masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxopt.graph import nodes
from onnxopt.passes.prune.prune_channels import PruneChannels
from tests.pruning.nets import Net, assert_cut_is_exact, surveyed
from tests.support import execute, random_feeds, run_pass


def groups_of(proto: onnx.ModelProto) -> list[tuple[int, int]]:
    return [(len(group.channels), group.width) for group in surveyed(proto)[1].groups]


def projected(net: Net, heads: int, size: int, apart: bool, bias: bool = True) -> str:
    made = net.op("MatMul", "x", net.weight(12, heads * size))
    made = net.op("Add", made, net.weight(heads * size)) if bias else made
    if not apart:
        return made
    split = net.op("Reshape", made, net.constant(np.array([0, 0, heads, size], np.int64)))
    return net.op("Transpose", split, perm=[0, 2, 1, 3])


def joined(net: Net, y: str, width: int, apart: bool) -> str:
    if apart:
        turned = net.op("Transpose", y, perm=[0, 2, 1, 3])
        y = net.op("Reshape", turned, net.constant(np.array([0, 0, width], np.int64)))
    return net.op("MatMul", y, net.weight(width, 5))


def attending(net: Net, y: str, width: int, apart: bool, opset: int = 23) -> onnx.ModelProto:
    return net.model(joined(net, y, width, apart), ("N", 6, 12), ("N", 6, 5), opset)


@pytest.mark.parametrize(
    ("apart", "shared", "mask"),
    [
        (False, 4, None),
        (False, 2, (6, 6)),
        (True, 2, (4, 6, 6)),
        (True, 4, (1, 1, 6, 6)),
        (False, 2, (1, 4, 6, 6)),
    ],
)
def test_heads_of_attention(apart: bool, shared: int, mask: tuple[int, ...] | None) -> None:
    net = Net(0)
    q, k, v = (projected(net, *of, apart) for of in ((4, 8), (shared, 8), (shared, 3)))
    masks = [] if mask is None else [net.constant(net.rng.standard_normal(mask).astype(np.float32))]
    counts: dict[str, Any] = {} if apart else {"q_num_heads": 4, "kv_num_heads": shared}
    y = net.op("Attention", q, k, v, *masks, **counts)
    proto = attending(net, y, 12, apart)
    assert groups_of(proto) == [(shared, 3)]
    model = assert_cut_is_exact(proto)
    (node,) = (node for node in nodes(model) if node.op_type == "Attention")
    left = [node.attributes[name].as_int() for name in counts]
    assert left == ([] if apart else [2, shared // 2])


def test_products_of_queries_and_keys_go_with_their_heads() -> None:
    net = Net(0)
    q, k, v = (projected(net, *of, False) for of in ((4, 8), (4, 8), (4, 3)))
    y = net.op("Attention", q, k, v, outputs=4, q_num_heads=4, kv_num_heads=4)
    added = net.op("ReduceSum", net.nodes[-1].output[3], net.constant(np.array([1])), keepdims=0)
    for unused in (1, 2):
        net.nodes[-2].output[unused] = ""
    both = net.op("Add", joined(net, y, 12, False), net.op("MatMul", added, net.weight(6, 5)))
    proto = net.model(both, ("N", 6, 12), ("N", 6, 5), 23)
    assert groups_of(proto) == [(4, 3)]
    assert_cut_is_exact(proto)


@pytest.mark.parametrize("bias", [False, True])
def test_heads_of_the_runtimes_attention(bias: bool) -> None:
    net = Net(0)
    parts = [projected(net, 4, 8, False) for _ in range(3)]
    parts += [net.weight(96)] if bias else []
    y = net.op("MultiHeadAttention", *parts, num_heads=4, domain="com.microsoft")
    assert_heads_go(attending(net, y, 32, False))


def test_heads_of_attention_that_makes_its_own_queries() -> None:
    net = Net(0)
    x = net.op("LayerNormalization", "x", net.weight(12))
    y = net.op("Attention", x, net.weight(12, 96), net.weight(96), num_heads=4, domain="com.microsoft")
    proto = attending(net, y, 32, False)
    proto.graph.value_info.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, ("N", 6, 32)))
    assert_heads_go(proto)


def assert_heads_go(proto: onnx.ModelProto) -> None:
    assert [size for size, _ in groups_of(proto)] == [4]
    model = assert_cut_is_exact(proto)
    (node,) = (node for node in nodes(model) if "num_heads" in node.attributes)
    assert node.attributes["num_heads"].as_int() == 2


@pytest.mark.parametrize("inputs", [3, 2])
def test_attention_in_other_forms_stays(inputs: int) -> None:
    """Sizes of their own for values; queries, keys and values in one operand."""
    net = Net(0)
    made = projected(net, 4, 24, False)
    if inputs == 3:
        options: dict[str, Any] = {"qkv_hidden_sizes": [32, 32, 32]}
        y = net.op(
            "Attention",
            made,
            net.weight(96, 96),
            net.weight(96),
            num_heads=4,
            domain="com.microsoft",
            **options,
        )
    else:
        packed = net.op("Reshape", made, net.constant(np.array([0, 0, 4, 3, 8], np.int64)))
        y = net.op("MultiHeadAttention", packed, num_heads=4, domain="com.microsoft")
    proto = attending(net, y, 32, False)
    structure = surveyed(proto)[1]
    assert structure.groups == ()
    reasons = {pin.reason for pin in structure.pinned.values()}
    assert any("queries, keys and values are given in another way" in reason for reason in reasons)


@pytest.mark.parametrize("op_type", ["BiasGelu", "FastGelu", "Gelu", "QuickGelu"])
def test_activations_of_the_runtime(op_type: str) -> None:
    net = Net(0)
    bias = [net.weight(16)] if op_type == "BiasGelu" else []
    hidden = net.op(op_type, net.op("MatMul", "x", net.weight(12, 16)), *bias, domain="com.microsoft")
    proto = net.model(net.op("MatMul", hidden, net.weight(16, 5)), ("N", 6, 12), ("N", 6, 5))
    assert groups_of(proto) == [(16, 1)]
    assert_cut_is_exact(proto)


def run_time_shape(net: Net, *sizes: int) -> str:
    """The batch of x, and these sizes: as a Concat of what Shape says."""
    batch = net.op("Gather", net.op("Shape", "x"), net.constant(np.array([0], np.int64)))
    return net.op("Concat", batch, net.constant(np.array(sizes, np.int64)), axis=0)


def test_a_state_that_is_made_as_large_as_the_batch() -> None:
    """What exporters put in front of recurrent layers: zeros, and others, of computed shapes."""
    net = Net(0)
    ones = net.constant(np.ones((1, 8), np.float32))
    zeros = net.op("ConstantOfShape", run_time_shape(net, 8))
    start = net.op("Add", zeros, net.op("Expand", ones, run_time_shape(net, 8)))
    state = net.op("Unsqueeze", start, net.constant(np.array([0], np.int64)))
    steps = net.op("Transpose", "x", perm=[1, 0, 2])
    y = net.op("RNN", steps, net.weight(1, 8, 12), net.weight(1, 8, 8), "", "", state, hidden_size=8)
    last = net.op("Reshape", net.op("Transpose", y, perm=[2, 0, 1, 3]), run_time_shape(net, 6, 8))
    proto = net.model(net.op("MatMul", last, net.weight(8, 5)), ("N", 6, 12), ("N", 6, 5))
    assert groups_of(proto) == [(8, 1)]
    model = assert_cut_is_exact(proto)
    for batch in (1, 3):
        (found,) = execute(model, random_feeds(proto, sizes={"N": batch}))
        assert found.shape == (batch, 6, 5)


def test_zeros_as_large_as_a_value_lose_its_channels() -> None:
    net = Net(0)
    hidden = net.op("MatMul", "x", net.weight(12, 16))
    zeros = net.op("ConstantOfShape", net.op("Shape", hidden))
    y = net.op("MatMul", net.op("Max", hidden, zeros), net.weight(16, 5))
    proto = net.model(y, ("N", 6, 12), ("N", 6, 5))
    assert groups_of(proto) == [(16, 1)]
    assert_cut_is_exact(proto)


def test_an_output_that_nobody_reads_has_the_size_of_the_others() -> None:
    """onnx's checker holds recorded shapes against the inferred ones."""
    net = Net(0)
    y = net.op("LSTM", "x", net.weight(1, 32, 12), net.weight(1, 32, 8), hidden_size=8, outputs=3)
    flat = net.op("Squeeze", y, net.constant(np.array([1], np.int64)))
    proto = net.model(net.op("MatMul", flat, net.weight(8, 5)), (6, 2, 12), (6, 2, 5))
    for name in net.nodes[0].output[1:]:
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2, 8)))
    assert_cut_is_exact(proto)


def test_groups_of_one_layer_have_names_of_their_own() -> None:
    """Two halves of what a layer writes, read by one layer each, of other sizes."""
    net = Net(0)
    made = net.op("MatMul", "x", net.weight(12, 24))
    ends = net.constant(np.array([8, 16], np.int64))
    left, right = net.name("v"), net.name("v")
    net.nodes.append(helper.make_node("Split", [made, ends], [left, right], axis=-1))
    y = net.op("Add", net.op("MatMul", left, net.weight(8, 5)), net.op("MatMul", right, net.weight(16, 5)))
    proto = net.model(y, ("N", 6, 12), ("N", 6, 5))
    names = [group.name for group in surveyed(proto)[1].groups]
    assert names == [made, f"{made} (2)"]
    samples = [random_feeds(proto, seed, {"N": 8}) for seed in range(2)]
    assert run_pass(proto, PruneChannels(ratio=0.5, multiple=1, samples=samples)).changes == 2
