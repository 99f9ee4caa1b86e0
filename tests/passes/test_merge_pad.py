"""merge-pad against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.merge.merge_pad import MergePad
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

SHARED = "the value in between is read elsewhere too"
MODE = "a Pad of another mode than constant"
CROP = "pads that crop, or do not fit the axes"
FILL = "the two Pads fill with different values"
OTHER = "Pad does not fill with what the next op pads with"
AUTO = "auto_pad makes pads of its own"
CHANNELS = "Pad widens the batch or the channels"
WINDOW = "pads as large as the pool's window"
UNCOUNTED = "the pool does not count its own padding, but does count Pad's"
INF = float("inf")


def padded(
    *nodes: onnx.NodeProto, shape: list[int] | None, result: str, opset: int, constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        initializer=[numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    version = 10 if opset > 20 else 8
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)


def pad_chain(
    steps: list[tuple[list[int], list[int] | None]],
    *,
    opset: int = 18,
    shape: list[int] | None,
    fills: tuple[float | None, ...] = (None, None),
    modes: tuple[str, ...] = ("constant", "constant"),
) -> onnx.ModelProto:
    """Pads one after the other, each of them (pads, axes)."""
    nodes, constants = [], dict[str, np.ndarray]()
    for i, ((pads, axes), fill, mode) in enumerate(zip(steps, fills, modes, strict=True)):
        if opset < 11:
            value: dict[str, Any] = {} if fill is None else {"value": fill}
            nodes.append(helper.make_node("Pad", [f"v{i}"], [f"v{i + 1}"], pads=pads, mode=mode, **value))
            continue
        inputs = [f"v{i}", f"pads{i}"]
        constants[f"pads{i}"] = np.array(pads, np.int64)
        if fill is not None:
            constants[f"fill{i}"] = np.array(fill, np.float32)
        inputs.append("" if fill is None else f"fill{i}")
        if axes is not None:
            constants[f"axes{i}"] = np.array(axes, np.int64)
            inputs.append(f"axes{i}")
        nodes.append(helper.make_node("Pad", inputs, [f"v{i + 1}"], mode=mode))
    nodes[0].input[0] = "x"
    return padded(*nodes, shape=shape, result=f"v{len(steps)}", opset=opset, constants=constants)


@pytest.mark.parametrize("opset", [2, 10, 11, 13, 18, 21])
@pytest.mark.parametrize("fill", [None, 0.0, 1.5, -INF])
def test_two_pads(opset: int, fill: float | None) -> None:
    steps: list[tuple[list[int], list[int] | None]] = [([0, 1, 2, 0], None), ([1, 1, 0, 3], None)]
    model = pad_chain(steps, opset=opset, shape=[2, 3], fills=(fill, fill))
    after = run_pass(model, MergePad())
    assert (after.op_types, after.declined) == (["Pad"], ())
    assert_equivalent(model, after.model)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([1, 2], [1]), ([3, 0], [1])),
        (([1, 2], [0]), ([3, 0], [1])),
        (([1, 2], [-1]), ([3, 0], [-1])),
        (([1, 2], [-1]), ([3, 0], [1])),
        (([1, 2], [-1]), ([3, 0, 0, 1], None)),
        (([0, 1, 1, 2], [1, 0]), ([], [])),
    ],
)
def test_axes(
    first: tuple[list[int], list[int] | None], second: tuple[list[int], list[int] | None], known: bool
) -> None:
    model = pad_chain([first, second], shape=[2, 3] if known else None)
    after = run_pass(model, MergePad())
    signs = {axis < 0 for _, axes in (first, second) for axis in (axes if axes is not None else [0])}
    reason = "an axis counts from the end of an unknown number of axes"
    assert after.declined == ((reason,) if len(signs) > 1 and not known else ())
    assert_equivalent(model, after.model, {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize(
    ("fills", "merges"),
    [
        ((None, 0.0), True),
        ((0.0, None), True),
        ((1.0, 1.0), True),
        ((None, 1.0), False),
        ((0.0, -0.0), False),
    ],
)
def test_fills(fills: tuple[float | None, float | None], merges: bool) -> None:
    model = pad_chain([([1, 1], None), ([0, 2], None)], shape=[3], fills=fills)
    after = run_pass(model, MergePad())
    assert (len(after.op_types), after.declined) == ((1, ()) if merges else (2, (FILL,)))
    assert_equivalent(model, after.model)


@pytest.mark.parametrize("modes", [("edge", "constant"), ("constant", "reflect"), ("edge", "edge")])
def test_other_modes(modes: tuple[str, str]) -> None:
    model = pad_chain([([1, 1], None), ([0, 2], None)], shape=[3], modes=modes)
    assert run_pass(model, MergePad()).declined == (MODE,)


def test_cropping_is_declined() -> None:
    model = pad_chain([([-1, 0], None), ([1, 0], None)], shape=[3])
    assert run_pass(model, MergePad()).declined == (CROP,)


@pytest.mark.parametrize("same", [True, False])
def test_fill_at_run_time(same: bool) -> None:
    model = text_model(
        f"""agraph (float[3] x, float a, float b) => (float[n] z) <int64[2] p = {{1, 2}}> {{
          y = Pad (x, p, a)
          z = Pad (y, p, {"a" if same else "b"})
        }}"""
    )
    after = run_pass(model, MergePad())
    assert (len(after.op_types), after.declined) == ((1, ()) if same else (2, (FILL,)))
    assert_equivalent(model, after.model)


@pytest.mark.parametrize(
    ("given", "results", "reason"),
    [
        ("float[3] x", "float[6] y, float[n] z", SHARED),
        ("float[3] x, int64[2] p", "float[n] z", "the pads are no constant"),
    ],
)
def test_pads_that_are_declined(given: str, results: str, reason: str) -> None:
    model = text_model(
        f"""agraph ({given}) => ({results}) <int64[2] p = {{1, 2}}> {{
          y = Pad (x, p)
          z = Pad (y, p)
        }}"""
    )
    after = run_pass(model, MergePad())
    assert (after.changes, after.declined) == (0, (reason,))


def window(
    op_type: str,
    amounts: list[int],
    *,
    shape: list[int] | None,
    opset: int = 18,
    axes: list[int] | None = None,
    fill: float | None = None,
    mode: str = "constant",
    kernel: tuple[int, ...] = (3, 2),
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """Pad, then a Conv from 2 to 3 channels or a pool."""
    rng = np.random.default_rng(0)
    constants, reads, pad = dict[str, np.ndarray](), ["y"], dict[str, Any]()
    if opset < 11:
        pad = {"pads": amounts, **({} if fill is None else {"value": fill})}
    else:
        constants = {"pads": np.array(amounts, np.int64)}
        if fill is not None:
            constants["fill"] = np.array(fill, np.float32)
        if axes is not None:
            constants["axes"] = np.array(axes, np.int64)
    inputs = (
        ["x"]
        if opset < 11
        else ["x", *(name if name in constants else "" for name in ("pads", "fill", "axes"))]
    )
    while not inputs[-1]:
        inputs.pop()
    if op_type == "Conv":
        constants["w"] = rng.standard_normal((3, 2, *kernel)).astype(np.float32)
        constants["b"] = rng.standard_normal(3).astype(np.float32)
        reads += ["w", "b"]
    else:
        attributes["kernel_shape"] = kernel
    nodes = [
        helper.make_node("Pad", inputs, ["y"], mode=mode, **pad),
        helper.make_node(op_type, reads, ["z", "indices"][:outputs], **attributes),
    ]
    return padded(*nodes, shape=shape, result="z", opset=opset, constants=constants)


IMAGE = [2, 2, 5, 6]


@pytest.mark.parametrize("opset", [9, 11, 18, 21])
@pytest.mark.parametrize("shape", [IMAGE, None])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"kernel_shape": [3, 2]},
        {"pads": [1, 0, 2, 1]},
        {"auto_pad": "VALID"},
        {"auto_pad": "NOTSET", "strides": [2, 1], "dilations": [1, 2]},
    ],
)
def test_conv(attributes: dict[str, Any], shape: list[int] | None, opset: int) -> None:
    model = window("Conv", [0, 0, 1, 2, 0, 0, 4, 3], opset=opset, shape=shape, **attributes)
    after = run_pass(model, MergePad())
    assert (after.op_types, after.declined) == (["Conv"], ())
    assert_equivalent(
        model, after.model, {"x": random_feeds(window("Conv", [0] * 8, shape=IMAGE))["x"]}, kind="reorder"
    )


@pytest.mark.parametrize(
    ("axes", "reason"), [([2], None), ([-1], None), ([-2, 3], None), ([1], CHANNELS), ([-4], CHANNELS)]
)
def test_conv_after_pad_of_some_axes(axes: list[int], reason: str | None) -> None:
    model = window("Conv", [0, 1] * len(axes), axes=axes, shape=IMAGE, fill=0.0)
    if axes == [1]:
        model = window("Conv", [0, 0, 1, 1], axes=[1, 2], shape=[2, 1, 5, 6])
    after = run_pass(model, MergePad())
    assert after.declined == (() if reason is None else (reason,))
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize("spatial", [1, 3])
def test_conv_of_other_ranks(spatial: int) -> None:
    pads = [0, 0, *[1] * spatial, 0, 0, *[2] * spatial]
    model = window("Conv", pads, shape=[1, 2, *[4] * spatial], kernel=(2,) * spatial)
    after = run_pass(model, MergePad())
    assert after.op_types == ["Conv"]
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fill": 1.0}, OTHER),
        ({"fill": -0.0}, OTHER),
        ({"mode": "reflect"}, MODE),
        ({"auto_pad": "SAME_UPPER"}, AUTO),
        ({"auto_pad": "SAME_LOWER"}, AUTO),
    ],
)
def test_conv_declines(options: dict[str, Any], reason: str) -> None:
    model = window("Conv", [0, 0, 1, 1, 0, 0, 1, 1], shape=IMAGE, **options)
    after = run_pass(model, MergePad())
    assert (after.changes, after.declined) == (0, (reason,))


@pytest.mark.parametrize("opset", [10, 11, 18])
@pytest.mark.parametrize("own", [[0, 0, 0, 0], [1, 0, 0, 1]])
@pytest.mark.parametrize("counts", [0, 1])
def test_average_pool(counts: int, own: list[int], opset: int) -> None:
    model = window(
        "AveragePool",
        [0, 0, 1, 1, 0, 0, 2, 0],
        opset=opset,
        shape=IMAGE,
        pads=own,
        count_include_pad=counts,
        strides=[1, 2],
    )
    after = run_pass(model, MergePad())
    merges = counts or not any(own)
    assert (after.changes, after.declined) == ((1, ()) if merges else (0, (UNCOUNTED,)))
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize("opset", [10, 11, 18])
@pytest.mark.parametrize("own", [[0, 0, 0, 0], [1, 0, 0, 1]])
def test_max_pool(own: list[int], opset: int) -> None:
    model = window("MaxPool", [0, 0, 1, 1, 0, 0, 2, 0], opset=opset, shape=IMAGE, fill=-INF, pads=own)
    after = run_pass(model, MergePad())
    assert (after.op_types, after.declined) == (["MaxPool"], ())
    assert_equivalent(model, after.model)


@pytest.mark.parametrize("op_type", ["AveragePool", "MaxPool"])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ceil_mode": 1}, "a pool with ceil_mode or dilations"),
        ({"dilations": [2, 1]}, "a pool with ceil_mode or dilations"),
        ({"pads": [2, 0, 0, 0], "count_include_pad": 1}, WINDOW),
        ({"fill": 1.0}, OTHER),
        ({"auto_pad": "SAME_UPPER"}, AUTO),
    ],
)
def test_pools_decline(op_type: str, options: dict[str, Any], reason: str) -> None:
    given = {"fill": 0.0 if op_type == "AveragePool" else -INF, **options}
    if op_type == "MaxPool":
        given.pop("count_include_pad", None)
    model = window(op_type, [0, 0, 1, 1, 0, 0, 1, 1], opset=19, shape=IMAGE, **given)
    after = run_pass(model, MergePad())
    assert (after.changes, after.declined) == (0, (reason,))
    assert_equivalent(model, after.model)


def test_zeros_before_max_pool_and_indices_are_declined() -> None:
    pads = [0, 0, 1, 1, 0, 0, 1, 1]
    assert run_pass(window("MaxPool", pads, shape=IMAGE), MergePad()).declined == (OTHER,)
    indexed = window("MaxPool", pads, shape=IMAGE, fill=-INF, outputs=2)
    assert run_pass(indexed, MergePad()).declined == ("a pool with indices, which count the padding",)


def test_one_pad_for_two_convs_stays() -> None:
    model = text_model(
        """agraph (float[1, 1, 4] x, float[1, 1, 2] w, float[1, 1, 3] v)
            => (float[a, b, c] z, float[d, e, f] u) <int64[6] p = {0, 0, 1, 0, 0, 1}> {
          y = Pad (x, p)
          z = Conv (y, w)
          u = Conv (y, v)
        }"""
    )
    after = run_pass(model, MergePad())
    assert (after.changes, after.declined) == (0, (SHARED, SHARED))


def test_inside_a_branch_and_a_function() -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (bool c, float[1, 1, 4] x, float[1, 1, 2] w) => (float[a, b, n] z) {
          z = If (c) <
            then_branch = yes () => (float[a, b, n] t) {
              p = Constant <value = int64[6] {0, 0, 1, 0, 0, 1}> ()
              y = Pad (x, p)
              t = Conv (y, w)
            },
            else_branch = no () => (float[a, b, n] e) { e = local.f (x, w) }
          >
        }
        <domain: "local", opset_import: ["" : 17]>
        f (x, w) => (z) {
          p = Constant <value = int64[6] {0, 0, 1, 0, 0, 1}> ()
          y = Pad (x, p)
          v = Pad (y, p)
          z = Conv <kernel_shape = [2]> (v, w)
        }"""
    )
    after = run_pass(model, MergePad())
    assert (after.count("Pad"), after.count("Conv")) == (0, 2)
    one = np.ones((1, 1, 4), np.float32)
    samples = [{"c": np.array(c), "x": one, "w": one[..., :2]} for c in (True, False)]
    assert_equivalent(model, after.model, samples, kind="reorder")


@given(data=st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_random_windows(data: st.DataObject) -> None:
    op_type = data.draw(st.sampled_from(["Conv", "AveragePool", "MaxPool"]))
    amounts = st.integers(0, 2)
    begin, end, own = (data.draw(st.lists(amounts, min_size=n, max_size=n)) for n in (2, 2, 4))
    fill = data.draw(st.sampled_from([None, 0.0, -INF, 1.0]))
    options: dict[str, Any] = {"strides": data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))}
    if op_type == "AveragePool":
        options["count_include_pad"] = data.draw(st.integers(0, 1))
    if op_type != "Conv":
        own = [min(amount, limit) for amount, limit in zip(own, [2, 1, 2, 1], strict=True)]
        options["ceil_mode"] = data.draw(st.sampled_from([0, 0, 0, 1]))
    shape = [data.draw(st.integers(0, 2)), 2, data.draw(st.integers(3, 6)), data.draw(st.integers(2, 6))]
    assume(not (op_type == "Conv" and fill == -INF))
    pads = [0, 0, *begin, 0, 0, *end]
    model = window(op_type, pads, fill=fill, shape=shape, pads=own, **options)
    after = run_pass(model, MergePad())
    assert_equivalent(model, after.model, kind="reorder")
