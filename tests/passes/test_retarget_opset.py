"""retarget-opset: the same numbers from operators of another time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.ledger import Ledger
from onnxopt.model import load, opener
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.fuse.fuse_activation import FuseActivation
from onnxopt.passes.fuse.fuse_rmsnorm import FuseRmsnorm
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.retarget.retarget_opset import RetargetOpset
from onnxopt.pipeline import Pipeline
from onnxopt.protobuf import dump
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

CONSTANTS = """<
    int64[1] zero = {0}, int64[1] one = {1}, int64[2] parts = {1, 3}, int64[6] pads = {0, 1, 0, 2, 0, 1},
    float half = {0.5}, float[1] half1 = {0.5}, float[3] three = {1, 2, 3}, float[4] up = {1, 1, 2, 1.5},
    float[4] down = {1, 1, 0.5, 0.6}, float[0] none = {}, int64[4] sizes = {1, 2, 9, 5},
    float[1, 4] boxes = {0, 0, 3, 4}, float[1, 1, 3, 2] grid = {0.1, -0.3, 0.9, 0.2, -1, 1},
    int64[2] shape = {6, 4}, int64[2, 1] where = {0, 2}, float[2, 1] new = {7, 8},
    float[4, 5] k = {1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0}>"""
X, IMAGE = "float[2, 3, 4] x", "float[1, 2, 6, 8] x"
FORMS = [
    (11, X, "s = Slice(x, zero, one, zero)\n y = Squeeze<axes = [0]>(s)"),
    (11, "float[1, 3, 1] x", "y = Squeeze(x)"),
    (11, X, "y = Unsqueeze<axes = [0, -1]>(x)"),
    (12, X, "y = ReduceSum<axes = [1], keepdims = 0>(x)"),
    (12, X, "y = ReduceSum(x)"),
    *((13, X, f"y = Reduce{kind}<axes = [0, -1]>(x)") for kind in ("Max", "Mean", "L2", "LogSumExp", "Prod")),
    (9, X, "y = ReduceMin(x)"),
    (7, X, "y = Clip<min = -0.5, max = 0.25>(x)"),
    (10, X, "y = Clip<max = 0.25>(x)"),
    (9, X, "y = Clip(x)"),
    (7, X, "y = Pad<pads = [0, 1, 0, 2, 0, 1], value = 1.5>(x)"),
    (10, X, 'y = Pad<pads = [0, 1, 1, 0, 0, 1], mode = "reflect">(x)'),
    (13, X, "y = Pad(x, pads, half)"),
    (9, X, "y = Slice<starts = [1, -3], ends = [2, 1000], axes = [0, 2]>(x)"),
    (9, X, "y = Slice<starts = [1], ends = [2]>(x)"),
    (10, X, "y = Slice(x, zero, one, one)"),
    (7, X, "y = Dropout<ratio = 0.25>(x)"),
    (10, X, "y = Dropout(x)"),
    (12, X, "y = Dropout(x, half)"),
    (11, X, "y, z = Split<axis = 2, split = [1, 3]>(x)"),
    (11, X, "y, z = Split<axis = -1>(x)"),
    (13, X, "y, z = Split<axis = 2>(x)"),
    (13, X, "y, z = Split<axis = 2>(x, parts)"),
    *((11, X, f"y = {op}(x)") for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *((11, X, f"y = Softmax<axis = {axis}>(x)") for axis in (0, 2, -1, -2)),
    *((11, f"float[{shape}] x", "y = Softmax<axis = 1>(x)") for shape in ("2, 3, 1", "N, 3, 4", "N, 0, 4")),
    (9, X, "y = BatchNormalization<epsilon = 0.01>(x, three, three, three, three)"),
    (8, X, "y = BatchNormalization<spatial = 1>(x, three, three, three, three)"),
    (14, X, "y = BatchNormalization(x, three, three, three, three)"),
    (7, IMAGE, "y = Upsample<scales = [1.0, 1.0, 2.0, 3.0]>(x)"),
    (8, IMAGE, 'y = Upsample<scales = [1.0, 1.0, 1.5, 1.25], mode = "linear">(x)'),
    *((9, IMAGE, f'y = Upsample<mode = "{mode}">(x, up)') for mode in ("nearest", "linear")),
    *((10, IMAGE, f'y = Resize<mode = "{mode}">(x, up)') for mode in ("nearest", "linear")),
    *((10, IMAGE, f'y = Resize<mode = "{mode}">(x, down)') for mode in ("nearest", "linear")),
    (11, IMAGE, "y = Resize(x, none, up)"),
    (12, IMAGE, 'y = Resize<mode = "cubic", coordinate_transformation_mode = "align_corners">(x, none, up)'),
    (13, IMAGE, 'y = Resize<mode = "linear">(x, , , sizes)'),
    (18, IMAGE, "y = GroupNormalization<num_groups = 1>(x, half1, half1)"),
    (16, IMAGE, 'y = GridSample<mode = "bicubic">(x, grid)'),
    (16, IMAGE, "y = GridSample(x, grid)"),
    (9, "float[3, 6] x", "y, z = TopK<k = 2, axis = 1>(x)"),
    (10, "float[3, 6] x", "y, z = TopK(x, one)"),
    (10, "float[2, 3] x", "y = Scatter<axis = 1>(x, where, new)"),
    (10, IMAGE, "y = RoiAlign<output_height = 2, output_width = 3>(x, boxes, zero)"),
    (17, "float[1, 8, 2] x", "y = DFT<axis = 1>(x)"),
    (17, "float[4, 8, 1] x", "y = DFT(x)"),
    (8, IMAGE, "y, z = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)"),
    (9, X, "m = Reshape(x, shape)\n y = Gemm(m, k, half)"),
]


def raised(text: str, opset: int, version: int, ir_version: int = 7) -> tuple[onnx.ModelProto, Rewritten]:
    text = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}'
    return text_model(text), run_pass(text, RetargetOpset(version))


@pytest.mark.parametrize("version", [19, 21, 23])
@pytest.mark.parametrize(
    ("opset", "port", "lines"), FORMS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_forms(opset: int, port: str, lines: str, version: int) -> None:
    if "GroupNorm" in lines:
        version = max(version, 21)  # in between, the standard has none
    if "RoiAlign" in lines:
        version = min(version, 21)  # the runtime has no kernel for its form of opset 22
    proto, result = raised(f"g ({port}) => (float[] y) {CONSTANTS} {{ {lines} }}", opset, version)
    assert (result.changes, result.model.opset_imports[""]) == (1, version)
    assert_equivalent(proto, result.model, random_feeds(proto, sizes={"N": 2}))


@pytest.mark.parametrize(
    ("opset", "lines", "reason"),
    [
        (11, "y, z = Dropout(x)\n v = Cast<to = 1>(z)", "Dropout: its mask is read, and was something else"),
        (8, "y = BatchNormalization<spatial = 0>(x, w, w, w, w)", "BatchNormalization: spatial=0 is no more"),
        (9, "y, v = BatchNormalization(x, w, w, w, w)",
         "BatchNormalization: it trains, in a form of its own"),
        (10, "s = Cast<to = 1>(x)\n y = Resize(x, w)", "Resize: its scales are no constant"),
        (10, "y = Resize(x, both)", "Resize: it makes one axis larger and another smaller"),
        (11, 'y = Resize<coordinate_transformation_mode = "tf_half_pixel_for_nn">(x, none, both)',
         "Resize: its mode is no more"),
        (18, "y = GroupNormalization<num_groups = 1>(x, w, w)",
         "GroupNormalization: its scale or channels are not known"),
        (10, "y = AveragePool<kernel_shape = [2], ceil_mode = 1>(x)",
         "AveragePool: with ceil_mode it may give another shape"),
        (10, 'y = ConvTranspose<auto_pad = "SAME_UPPER">(x, x)', "ConvTranspose: it pads on the other side"),
        (9, "i = Cast<to = 7>(x)\n y = OneHot(i, two, w)", "OneHot: negative indices got a meaning"),
        (9, "i = Cast<to = 7>(x)\n y = Erf(i)", "Erf: it takes no tensor(int64) under opset 21"),
        (9, "y = Affine(x)", "Affine is no operator of opset 9"),
        (22, "y = Neg(x)", "it is of opset 22, which is newer"),
        (6, "y = Neg(x)", "only opsets 7 to 26 are known"),
    ],
)  # fmt: skip
def test_what_cannot_be_said_leaves_the_model_whole(opset: int, lines: str, reason: str) -> None:
    """A Squeeze beside it, which could be raised, stays as well."""
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
        g (float[1, 2, 3] x, float[3] w) => (float[] y, float[] q)
        <float[3] both = {{1, 2, 0.5}}, float[0] none = {{}}, int64 two = {{2}}> {{
            {lines}
            q = Squeeze<axes = [0]>(x)
        }}"""
    model = load(text_model(text))
    if " i = " in f" {lines}":
        model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.INT64)
    before, ledger = ir.to_proto(model).SerializeToString(), Ledger()
    RetargetOpset(21).apply(model, ledger)
    assert not ledger.granted
    assert reason in ledger.declined.values()
    assert ir.to_proto(model).SerializeToString() == before


def test_beyond_what_is_known() -> None:
    _, result = raised("g (float[2] x) => (float[2] y) { y = Neg(x) }", 21, 27)
    assert result.declined == ("only opsets 7 to 26 are known",)


@pytest.mark.parametrize(("before", "version", "after"), [(3, 21, 3), (4, 13, 7), (7, 21, 10), (11, 21, 11)])
def test_ir_versions(before: int, version: int, after: int) -> None:
    """Below IR version 4 new constants are nodes: each initializer would have to be a graph input."""
    proto, result = raised(
        "g (float[1, 2] x) => (float[2] y) { y = Squeeze<axes = [0]>(x) }", 11, version, before
    )
    assert result.model.ir_version == after
    assert bool(result.model.graph.initializers) == (before >= 4)
    assert_equivalent(proto, result.model)


def test_bodies_functions_and_other_domains() -> None:
    """A function has an opset of its own; operators of other domains stay untouched, whatever their name."""
    text = """<ir_version: 8, opset_import: ["" : 11, "com.microsoft" : 1, "d" : 1]>
        g (float[2, 1] x, bool c) => (float[2] y) {
            t = com.microsoft.Gelu(x)
            u = d.Squeeze<axes = [1]>(t)
            y = If(c) <then_branch = p () => (float[2] a) {
                           v = Softmax<axis = 0>(x)\n a = Squeeze<axes = [1]>(v) },
                       else_branch = q () => (float[2] b) { b = ReduceSum<axes = [0], keepdims = 0>(u) }>
        }
        <domain: "d", opset_import: ["" : 12]> Squeeze <axes> (a) => (b) {
            k = Neg(a)
            b = Unsqueeze<axes = [0]>(k)
        }"""
    proto, result = text_model(text), run_pass(text, RetargetOpset(21))
    assert result.model.opset_imports == {"": 21, "com.microsoft": 1, "d": 1}
    assert [function.opset_imports[""] for function in result.model.functions.values()] == [21]
    x = np.array([[1], [-2]], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_an_attribute_that_the_caller_gives_cannot_become_an_input() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "d" : 1]>
        g (float[1, 2] x) => (float[2] y) { y = d.f<a = [0]>(x) }
        <domain: "d", opset_import: ["" : 12]> f <a> (x) => (y) { y = Squeeze<axes: ints = @a>(x) }"""
    assert run_pass(text, RetargetOpset(21)).declined == (
        "an attribute that becomes an input refers to one of the enclosing function",
    )


def test_names_texts_and_weights_stay() -> None:
    """A weight is handed on as it is, without a look at it."""
    model = load(
        text_model(
            """<ir_version: 7, opset_import: ["" : 11]>
            g (float[2, 3] x) => (float[2, 3] y) <float[3] w = {1, 2, 3}> {
                [squeeze] a = Squeeze<axes = [0]>(w0)
                w0 = Unsqueeze<axes = [0]>(w)
                [soft] b = Softmax<axis = 0>(x)
                y = Mul(b, a)
            }"""
        )
    )

    def read() -> ir.TensorProtocol:
        raise AssertionError("the weight is read")

    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([3]), name="w")
    model.graph.initializers["w"].const_value = lazy
    squeeze = next(node for node in model.graph if node.name == "squeeze")
    squeeze.doc_string, squeeze.metadata_props["origin"] = "text", "layer 3"
    RetargetOpset(21)(model)
    assert model.graph.initializers["w"].const_value is lazy
    named = {node.name: node for node in model.graph}
    assert named["squeeze"] is squeeze
    assert (squeeze.doc_string, squeeze.metadata_props, len(squeeze.inputs)) == (
        "text",
        {"origin": "layer 3"},
        2,
    )
    assert named["soft"].op_type == "Softmax"


STEPS = (
    *("Softmax<axis = {axis}>({a})", "Hardmax<axis = {axis}>({a})", "ReduceMax<axes = [{axis}]>({a})"),
    *("Clip<min = -0.5>({a})", "ReduceSum<axes = [0, {axis}], keepdims = 1>({a})", "Dropout({a})"),
    *(
        "Pad<pads = [0, 1, 0, 1, 0, 0], value = 0.5>({a})",
        "Slice<starts = [0], ends = [2], axes = [{axis}]>({a})",
    ),
    *("Neg({a})", "Add({a}, {b})", "LogSoftmax<axis = {axis}>({a})"),
)


@st.composite
def programs(draw: st.DrawFn) -> str:
    """A chain of operators in their old forms; the axes are of rank 3 throughout."""
    lines, seen = [], ["x"]
    for number in range(draw(st.integers(1, 6))):
        a, axis = draw(st.sampled_from(seen)), draw(st.integers(0, 2))
        step = draw(st.sampled_from(STEPS)).format(a=a, b=a, axis=axis)
        lines.append(f"v{number} = {step}")
        seen.append(f"v{number}")
    return "\n".join(lines) + f"\n y = Identity({seen[-1]})"


@given(programs(), st.sampled_from([7, 8, 9]), st.sampled_from([12, 13, 17, 18, 21, 23, 26]))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_random_chains(lines: str, opset: int, version: int) -> None:
    head = f'<ir_version: 7, opset_import: ["" : {opset}]> g (float[2, 3, 4] x) => (float[A, B, C] y)'
    proto = onnx.shape_inference.infer_shapes(text_model(f"{head} {{ {lines} }}"))
    result = run_pass(proto, RetargetOpset(version))
    assert result.model.opset_imports[""] == version
    assert_equivalent(proto, result.model)


GELU_AND_RMS = """<ir_version: 8, opset_import: ["" : 14]> agraph (float[2,4] x) => (float[2,4] y)
    <float r = {1.4142135}, float one = {1}, float half = {0.5}, float[4] w = {1, 2, 3, 4},
    float e = {1e-5}> {
        a = Div(x, r) b = Erf(a) c = Add(b, one) d = Mul(x, c) g = Mul(d, half)
        s = Mul(g, g) m = ReduceMean<axes=[-1]>(s) t = Add(m, e) u = Sqrt(t) v = Div(g, u) y = Mul(v, w)
    }"""


@pytest.mark.parametrize(("version", "opset"), [(17, 14), (20, 20), (22, 20), (23, 23)])
def test_on_demand_goes_as_far_as_other_passes_ask(version: int, opset: int) -> None:
    before = text_model(GELU_AND_RMS)
    passes = (InferShapes(), FuseActivation(), FuseRmsnorm(), RetargetOpset(version, on_demand=True))
    done = Pipeline(passes).run(opener(before))
    assert done.model.opset_imports[""] == opset
    types = {node.op_type for node in done.model.graph}
    assert ("Gelu" in types, "RMSNormalization" in types) == (opset >= 20, opset >= 23)
    assert_equivalent(before, done.model, kind="reorder")


def test_what_is_asked_for_in_a_later_round_is_heard() -> None:
    """At first a value inside is read elsewhere, too, by a node that nobody reads."""
    before = text_model(GELU_AND_RMS.replace("c = Add", "unread = Neg(b) c = Add"))
    recipe = Pipeline((InferShapes(), FuseActivation(), EliminateDead(), RetargetOpset(20, on_demand=True)))
    done = recipe.run(opener(before))
    assert done.model.opset_imports[""] == 20
    assert recipe.run(opener(dump(done.model))).changes == 0


def test_on_demand_leaves_alone_what_nobody_asks_for() -> None:
    before = text_model(
        '<ir_version: 8, opset_import: ["" : 14]> agraph (float[2] x) => (float[2] y) { y = Neg(x) }'
    )
    done = Pipeline((FuseActivation(), RetargetOpset(on_demand=True))).run(opener(before))
    assert (done.changes, done.model.opset_imports[""]) == (0, 14)


def test_an_operator_that_would_lose_its_kernel_keeps_the_model_where_it_is() -> None:
    text = "agraph (float[3] x) => (float[3] y) { r = RandomNormalLike(x) y = Add(r, x) }"
    kept = run_pass(text, RetargetOpset(23))
    assert (kept.changes, kept.declined) == (0, ("ONNX Runtime has no kernel for it from opset 22 on",))
    assert run_pass(text, RetargetOpset(21)).model.opset_imports[""] == 21
