"""Residual blocks that are missed least go; what is left is the model without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import nodes
from onnxopt.ledger import Ledger, Rewrite
from onnxopt.passes.prune.drop_layers import DropLayers
from onnxopt.pipeline import Pipeline
from tests.support import execute, random_feeds, sqnr, text_model

RULE = "residual block"


def stack(scales: Sequence[float], dtype: str = "float") -> onnx.ModelProto:
    """h <- h + s h for each scale, by a matrix; 4 numbers in, 4 out."""
    weights, body = [], "h0 = Abs(x)\n"
    for i, scale in enumerate(scales):
        array = (scale * np.eye(4)).reshape(-1)
        elements = ", ".join(
            map(str, array.astype(np.float16).view(np.uint16) if dtype == "float16" else array)
        )
        weights.append(f"{dtype}[4, 4] w{i} = {{{elements}}}")
        body += f"f{i} = MatMul(h{i}, w{i})\n"
        body += f"h{i + 1} = Add({f'h{i}, f{i}' if i % 2 else f'f{i}, h{i}'})\n"
    body += f"y = Relu(h{len(scales)})"
    return text_model(f"m ({dtype}[N, 4] x) => ({dtype}[N, 4] y) <{', '.join(weights)}> {{ {body} }}")


def samples_of(proto: onnx.ModelProto, count: int = 3) -> list[Feeds]:
    return [random_feeds(proto, seed, sizes={"N": 2 + seed}) for seed in range(count)]


def drop(
    proto: onnx.ModelProto | str, one: DropLayers, ledger: Ledger | None = None
) -> tuple[ir.Model, list[str], list[str]]:
    """The model after one run, where blocks were dropped, and why others were not."""
    model = ir.from_proto(text_model(proto) if isinstance(proto, str) else proto)
    ledger = ledger or Ledger()
    ledger.pass_name = one.name
    one.apply(model, ledger)
    dropped = [rewrite.site for rewrite in ledger.granted if rewrite.rule == RULE]
    return model, dropped, [why for what, why in ledger.declined.items() if what.rule == RULE]


@pytest.mark.parametrize("dtype", ["float", "double", "float16"])
@pytest.mark.parametrize(("number", "left"), [(1, [0.5, 0.4]), (2, [0.5]), (3, [])])
def test_the_blocks_that_are_missed_least_go(number: int, left: list[float], dtype: str) -> None:
    proto = stack([0.5, 0.1, 0.4], dtype)
    samples = samples_of(proto)
    model, dropped, declined = drop(proto, DropLayers(number=number, samples=samples))
    assert len(dropped) == number
    assert declined == ["other blocks are missed less"] * len(left)
    for feeds in samples:
        [want], [have] = execute(stack(left, dtype), feeds), execute(model, feeds)
        np.testing.assert_array_equal(want, have)


def test_what_is_left_is_measured_again() -> None:
    """Outputs are (1 + a)(1 + b)(1 + c) x: without c, what b takes away is no longer missed, and a is."""
    proto = stack([0.5, -0.3, 0.4])
    _, dropped, _ = drop(proto, DropLayers(number=2, samples=samples_of(proto)))
    assert dropped == ["h3", "h2"]


def test_the_energy_of_the_outputs_sets_an_end() -> None:
    """As above: 1 - (0.4 / 1.4)^2 = 0.918 without c, and 1 - (0.47 / 1.47)^2 = 0.898 without all."""
    proto = stack([0.5, -0.3, 0.4])
    samples = samples_of(proto)
    for energy, count in ((0.92, 0), (0.91, 2), (0.89, 3)):
        _, dropped, _ = drop(proto, DropLayers(number=3, energy=energy, samples=samples))
        assert len(dropped) == count


def test_a_pipeline_drops_once_and_can_leave_out() -> None:
    proto = stack([0.5, 0.1, 0.4])
    one = DropLayers(samples=samples_of(proto))
    done = Pipeline((one,)).run(lambda: ir.from_proto(proto))
    assert (len([r for r in done.granted if r.rule == RULE]), done.settled) == (1, True)
    _, dropped, _ = drop(proto, one, Ledger(left_out=frozenset({Rewrite(one.name, RULE, "h2")})))
    assert dropped == ["h3"]
    _, dropped, _ = drop(proto, one, Ledger(veto=lambda *_: "not here"))
    assert dropped == []


def test_a_choice_needs_samples() -> None:
    with pytest.raises(UsageError, match=r"drop-layers: which of 3 blocks are missed least needs samples"):
        drop(stack([0.5, 0.1, 0.4]), DropLayers())
    with pytest.raises(UsageError, match="needs samples"):
        drop(stack([0.5]), DropLayers(energy=0.5))
    assert drop("m (float[2] x) => (float[2] y) { y = Relu(x) }", DropLayers())[1] == []


WEIGHT = "<float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>"
SHAPES = "the shapes of the block's input and output are not known to be the same"


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "reason"),
    [
        ("float[2, 4] x", "float[2, 4] y", "h = Abs(x) f = MatMul(h, w) y = Add(h, f)", None),
        (
            "float[2, 4] x",
            "float[2, 4] y",
            "f = MatMul(x, w) y = Add(x, f)",
            "is a graph output whose value comes from outside the graph",
        ),
        (
            "float[2, 4] x",
            "float[2, 4] y, float[2, 4] f",
            "h = Abs(x) f = MatMul(h, w) y = Add(h, f)",
            "a value of the branch is read elsewhere, too",
        ),
        (
            "float[2, 4] x",
            "float[2, 4] y, float[2, 4] z",
            "h = Abs(x) g = MatMul(h, w) f = Relu(g) y = Add(f, h) z = Neg(g)",
            "a value of the branch is read elsewhere, too",
        ),
        (
            "float[2, 4] x, int64[2] s",
            "float[2, 4] y",
            "h = Reshape(x, s) f = MatMul(h, w) a = Add(h, f) y = Relu(a)",
            SHAPES,
        ),
        (
            "float[1, 4] x, float[4, 4] m",
            "float[4, 4] y",
            "h = Abs(x) g = MatMul(h, w) f = Mul(g, m) a = Add(h, f) y = Relu(a)",
            SHAPES,
        ),
        (
            "float[2, 4] x, float[2, 4] m",
            "float[2, 4] y",
            "h = Abs(x) g = MatMul(h, w) f = Mul(g, m) a = Add(h, f) y = Relu(a)",
            "a graph input would no longer be read",
        ),
        (
            "float[4, 4] x",
            "float[4, 4] y",
            "h = Relu(w) f = MatMul(h, x) a = Add(h, f) y = Relu(a)",
            "a graph output would be constant",
        ),
        (
            "float[2, 4] x",
            "float[2, 4] y",
            "h = my.ops.Odd(x) f = MatMul(h, h) a = Add(h, f) y = my.ops.Odd(a)",
            "the type is not known to be a float",
        ),
    ],
)
def test_what_is_declined(inputs: str, outputs: str, body: str, reason: str | None) -> None:
    body = "\n".join(part.strip() for part in body.replace(") ", ")\n").split("\n"))
    opsets = '<ir_version: 10, opset_import: ["" : 17, "my.ops" : 1]>'
    text = f"{opsets} m ({inputs}) => ({outputs}) {WEIGHT} {{ {body} }}"
    _, dropped, declined = drop(text, DropLayers())
    assert (len(dropped), declined) == ((1, []) if reason is None else (0, [reason]))


@pytest.mark.parametrize(
    "body",
    [
        "h = Abs(x) f = Mul(h, h) y = Add(h, f)",  # nothing is learnt
        "h = Abs(x) f = MatMul(h, w) g = MatMul(x, w) y = Add(g, f)",  # two branches
        "h = MatMul(x, w) y = Add(h, h)",
        "h = MatMul(x, w) y = Add(h, w)",
        "h = Abs(x) s = Shape(h) f = ConstantOfShape(s) g = MatMul(f, w) y = Add(h, g)",  # of its size only
    ],
)
def test_what_is_no_block(body: str) -> None:
    body = body.replace(") ", ")\n")
    _, dropped, declined = drop(f"m (float[4, 4] x) => (float[4, 4] y) {WEIGHT} {{ {body} }}", DropLayers())
    assert (dropped, declined) == ([], [])


def test_the_size_of_a_branch_may_be_read_elsewhere() -> None:
    proto = text_model(f"""m (float[2, 4] x) => (float[2, 4] y, int64[2] s) {WEIGHT} {{
        h = Abs(x)
        f = MatMul(h, w)
        s = Shape(f)
        y = Add(h, f)
    }}""")
    model, dropped, _ = drop(proto, DropLayers())
    feeds = random_feeds(proto)
    assert dropped == ["y"]
    np.testing.assert_array_equal(execute(model, feeds)[0], np.abs(feeds["x"]))


def test_one_block_within_another() -> None:
    """y = h + f(a), a = h + g(h): the outer one holds the inner one, which goes with it."""
    proto = text_model(f"""m (float[2, 4] x) => (float[2, 4] y) {WEIGHT[:-1]}, float tiny = {{0.001}}> {{
        h = Abs(x)
        g = MatMul(h, w)
        a = Add(h, g)
        s = Mul(a, tiny)
        f = MatMul(s, w)
        b = Add(h, f)
        y = Relu(b)
    }}""")
    model, dropped, _ = drop(proto, DropLayers(number=1, samples=samples_of(proto)))
    assert dropped == ["a"]
    model, dropped, _ = drop(proto, DropLayers(number=2, samples=samples_of(proto)))
    assert dropped == ["a", "b"]
    feeds = random_feeds(proto)
    np.testing.assert_array_equal(execute(model, feeds)[0], np.abs(feeds["x"]))
    assert [node.op_type for node in nodes(model)] == ["Abs", "Relu"]


BRANCHES = """
    m (bool c, float[2, 4] x) => (float[2, 4] y) <float[4, 4] w = {
        0.1, 0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0.1}> {
        h = Abs(x)
        y = If(c) <
            then_branch = t () => (float[2, 4] p) {
                f = MatMul(h, w)
                a = Add(h, f)
                p = Relu(a)
            },
            else_branch = e () => (float[2, 4] q) {
                e1 = Abs(h)
                g = MatMul(e1, w)
                g2 = Add(g, g)
                b = Add(e1, g2)
                q = Relu(b)
            }
        >
    }"""


def test_blocks_in_branches_are_measured_where_they_run() -> None:
    proto = text_model(BRANCHES)
    feeds = [{**random_feeds(proto, seed), "c": np.array(seed > 0)} for seed in range(3)]
    _, dropped, _ = drop(proto, DropLayers(samples=feeds))
    assert dropped == ["a"]  # (0.1 / 1.1)^2 of two samples of three, against (0.2 / 1.2)^2 of one
    model, dropped, _ = drop(proto, DropLayers(number=2, samples=feeds))
    assert sorted(dropped) == ["a", "b"]
    for one in feeds:
        assert sqnr(execute(model, one)[0], np.abs(one["x"])) == float("inf")


def test_blocks_of_functions_are_declined() -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        m (float[2, 4] x) => (float[2, 4] y) {WEIGHT} {{ y = my.block(x, w) }}
        <domain: "my", opset_import: ["" : 17]> block (a, v) => (b) {{
            h = Abs(a)
            f = MatMul(h, v)
            b = Add(h, f)
        }}"""
    _, dropped, declined = drop(text, DropLayers())
    assert dropped == []
    assert len(declined) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": -1}, "number is -1; expected at least 0"),
        ({"energy": 1.0}, r"energy is 1.0; expected a share, from 0 to below 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"drop-layers: {message}"):
        DropLayers(**options)


def test_what_cannot_go_leaves_the_next_one() -> None:
    """The first block is missed least, but is the only one that reads m."""
    inputs, weights = "float[2, 4] x, float[2, 4] m", f"{WEIGHT[:-1]}, float t = {{0.01}}>"
    proto = text_model(f"""m ({inputs}) => (float[2, 4] y) {weights} {{
        h = Abs(x)
        g = MatMul(h, w)
        n = Sigmoid(m)
        p = Mul(g, n)
        f = Mul(p, t)
        a = Add(h, f)
        k = MatMul(a, w)
        b = Add(a, k)
        c = MatMul(b, w)
        d = MatMul(c, w)
        e = Add(d, b)
        y = Relu(e)
    }}""")
    _, dropped, declined = drop(proto, DropLayers(samples=samples_of(proto)))
    assert len(dropped) == 1
    assert declined == ["a graph input would no longer be read", "other blocks are missed less"]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((2, 4), np.float32), "m"))
    _, dropped, _ = drop(proto, DropLayers(samples=[{"x": random_feeds(proto)["x"]}]))
    assert dropped == ["a"]


def test_sizes_that_nobody_named_are_followed_or_seen() -> None:
    """Of an unnamed batch it is known that it stays; of h / 2 only samples tell, and not where that is 1."""
    proto = text_model("""m (float[?,2,h,w] x) => (float[] y) <float[2,2,1,1] w = {0.1, 0, 0, 0.1}> {
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)
        f = Conv(p, w)
        a = Add(p, f)
        y = Relu(a)
    }""")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for size, declined in ((6, []), (3, [SHAPES])):
        sample = {"x": np.ones((3, 2, size, 6), np.float32)}
        assert drop(proto, DropLayers(samples=[sample]))[2] == declined
    for size in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        size.Clear()
        size.dim_value = 6
    assert drop(proto, DropLayers())[1] == ["a"]


def test_blocks_of_one_name_in_two_branches_are_told_apart() -> None:
    """The first one is missed more."""
    text = BRANCHES.replace("a = Add(h, f)", "f2 = Add(f, f)\n a = Add(h, f2)").replace("Relu(b)", "Relu(a)")
    proto = text_model(text.replace("b = Add(e1, g2)", "a = Add(e1, g)").replace("g2 = Add(g, g)\n", ""))
    feeds = [{**random_feeds(proto, seed), "c": np.array(seed % 2 > 0)} for seed in range(4)]
    model, dropped, _ = drop(proto, DropLayers(samples=feeds))
    assert dropped == ["a"]
    for one in feeds:
        want = execute(proto, one)[0] if one["c"] else np.abs(one["x"])
        np.testing.assert_array_equal(execute(model, one)[0], want)
