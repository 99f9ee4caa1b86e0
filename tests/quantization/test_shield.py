"""What is to stay in floating point does, though the runtime would quantize it by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.quantization.quantizing import Quantized, model_of, quantized, random, runs_of, samples_for

W = random(8, 8, 3, 3)
LAYERS = {
    "Conv": "m = Conv(a, f)",
    "Conv, Relu": "p = Conv(a, f) m = Relu(p)",
    "Conv, Clip": "p = Conv(a, f) m = Clip(p, zero, six)",
    "ConvTranspose": "m = ConvTranspose(a, f)",
    "Transpose, Conv": "t = Transpose<perm = [0, 1, 3, 2]>(a) m = Conv(t, f)",
    "Conv, Transpose": "t = Conv(a, f) m = Transpose<perm = [0, 1, 3, 2]>(t)",
    "Conv, Relu, Transpose": "p = Conv(a, f) t = Relu(p) m = Transpose<perm = [0, 1, 3, 2]>(t)",
    "MaxPool, Conv": "t = MaxPool<kernel_shape = [2, 2]>(a) m = Conv(t, f)",
    "Slice, Unsqueeze, Squeeze, Conv": "s = Slice(a, one, six_, two) q = Unsqueeze(s, one) "
    "t = Squeeze(q, one) m = Conv(t, f)",
}


def between(middle: str, shape: str = "1,8,9,9", **constants: np.ndarray) -> Quantized:
    """Nodes that stay in floats, with those that move numbers, between two Convs in integers."""
    text = f"agraph (float[{shape}] x) => (float[] y) {{ a = Conv(x, u) {middle} y = Conv(m, v) }}"
    numbers: dict[str, Any] = {
        "zero": 0.0,
        "six": 6.0,
        "one": np.array([1]),
        "two": np.array([2]),
        "six_": np.array([6]),
    }
    given = {"u": random(8, 8, 1, 1), "v": random(4, 8, 1, 1), "f": W, **constants}
    model = model_of(text, **numbers, **given)
    stay = {"m", "p", "t", "s", "q"}
    return quantized(model, samples_for(model, H=9, W=9), pick=lambda u: u.site not in stay)


def assert_apart(done: Quantized, layers: int = 2) -> None:
    done.check()
    assert (done.layers, done.layer_kernels) == (layers, layers)
    assert done.fusion.unfused == ()
    assert min(done.least_sqnr(), done.least_sqnr("none")) >= 25


@pytest.mark.parametrize("shape", ["1,8,9,9", "N,8,H,W"])
@pytest.mark.parametrize("middle", LAYERS.values(), ids=list(LAYERS))
def test_a_float_layer_between_integers_keeps_its_weight(middle: str, shape: str) -> None:
    assert_apart(between(middle, shape))


def test_one_channel_is_no_obstacle() -> None:
    for shape in ("1,8,9,9", "N,8,H,W"):
        text = f"agraph (float[{shape}] x) => (float[] y) {{ a = Conv(x, u) m = Conv(a, f) y = Conv(m, v) }}"
        model = model_of(text, u=random(1, 8, 1, 1), f=random(8, 1, 3, 3), v=random(4, 8, 1, 1))
        assert_apart(quantized(model, samples_for(model, H=9, W=9), pick=lambda u: u.site != "m"))


@pytest.mark.parametrize(
    "middle",
    [
        "m = Gemm(h, f)",
        "m = Gemm<transB = 1>(h, f)",
        "t = MatMul(h, f) m = Add(t, b)",
        "t = MatMul(h, f) m = Add(b, t)",
    ],
)
@pytest.mark.parametrize("flat", ["Flatten(g)", "Reshape(g, s)"])
@pytest.mark.parametrize("moved", [False, True])
def test_products_keep_their_weight(middle: str, flat: str, moved: bool) -> None:
    text = (
        "agraph (float[3,8,5,5] x) => (float[] y) "
        f"{{ a = Conv(x, u) g = GlobalAveragePool(a) h = {flat} {middle} y = Gemm(m, v) }}"
    )
    constants = {"u": random(8, 8, 1, 1), "f": random(8, 8), "v": random(8, 4), "b": random(8)}
    model = model_of(text, s=np.array([0, -1]), **constants)
    stay = {"m", "t"} if moved else {"m", "t", "h"}
    assert_apart(quantized(model, pick=lambda u: u.site not in stay))


def test_the_shield_gives_the_same_numbers_and_layers_of_one_tensor_share_it() -> None:
    text = (
        "agraph (float[1,8,9,9] x) => (float[] y, float[] z) "
        "{ a = Conv(x, u) m = Conv(a, f) n = Conv(a, g) y = Conv(m, v) z = Conv(n, v) }"
    )
    weights = {"u": random(8, 8, 1, 1), "f": W, "g": -W, "v": random(4, 8, 1, 1)}
    done = quantized(model_of(text, **weights), pick=lambda u: u.site not in ("m", "n"))
    assert_apart(done, 3)
    wide = [node for node in done.model.graph if "by_channel" in (node.name or "")]
    assert len(wide) == 1
    assert [use.node.op_type for use in wide[0].outputs[0].uses()] == ["Conv", "Conv"]
    scale, zero = (done.array(value.name or "") for value in wide[0].inputs[1:] if value is not None)
    params = done.plan.params["a"]
    assert (scale == params.scale).all()
    assert (zero == params.zero_point).all()
    assert scale.shape == zero.shape == (8,)


def test_layers_that_the_runtime_leaves_alone_get_no_shield() -> None:
    done = between("m = MatMul(a, f)", f=random(9, 9))
    assert_apart(done)
    assert not any("by_channel" in name or "copy" in name for name in names(done.model))


def names(model: ir.Model) -> list[str]:
    return [node.name or "" for node in model.graph]


SCORES = "agraph (float[2,6,T] x) => (float[] y) { a = LeakyRelu(x) p = Softmax(a) y = LeakyRelu(p) }"


@pytest.mark.parametrize("length", [1, 2, 7, 600])
@pytest.mark.parametrize("static", [True, False])
def test_a_softmax_between_integers_stays_in_floats(length: int, static: bool) -> None:
    """As an integer kernel it would be ten times as slow, and give 0 for what is above the range."""
    model = model_of(SCORES.replace("T", str(length)) if static else SCORES)
    done = quantized(model, samples_for(model, T=length))
    assert set(done.sites) == {"a", "y"}
    assert (done.fusion.kernels["QLinearSoftmax"], done.fusion.kernels["Softmax"]) == (0, 1)
    assert min(done.least_sqnr(), done.least_sqnr("none")) >= 30
    other = [{"x": 3 * array} for feeds in done.samples for array in feeds.values()]
    for one, two in zip(runs_of(done.model, other, "none"), runs_of(done.model, other), strict=True):
        np.testing.assert_allclose(one["y"], two["y"], atol=1.01 * float(done.plan.params["y"].scale))


FREE = {
    "Add": "m = Add(a, b)",
    "Concat": "m = Concat<axis = 1>(a, b)",
    "GlobalAveragePool": "m = GlobalAveragePool(a)",
    "LeakyRelu": "m = LeakyRelu(a)",
    "MatMul": "m = MatMul(a, b)",
    "Mul": "m = Mul(a, b)",
    "Sigmoid": "m = Sigmoid(a)",
    "Where": "m = Where(c, a, b)",
}
FLOAT = {
    "AveragePool": "m = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(a)",
    "Clip": "m = Clip(a, one, six)",
    "Div": "m = Div(a, k)",
    "Elu": "m = Elu(a)",
    "Erf": "m = Erf(a)",
    "HardSigmoid": "m = HardSigmoid(a)",
    "InstanceNormalization": "m = InstanceNormalization(a, s, s)",
    "LayerNormalization": "m = LayerNormalization(a, s)",
    "Max": "m = Max(a, b)",
    "PRelu": "m = PRelu(a, k)",
    "Pad": "m = Pad(a, pads)",
    "ReduceMean": "m = ReduceMean<axes = [2, 3]>(a)",
    "Softmax": "m = Softmax(a)",
    "Softmax, inner": "m = Softmax<axis = 1>(a)",
    "Sub": "m = Sub(a, b)",
    "Sum": "m = Sum(a, b)",
    "Tanh": "m = Tanh(a)",
}


def unchosen(middle: str) -> Quantized:
    """One operator in floats, between others in integers."""
    constants = {
        "u": random(8, 8, 1, 1),
        "k": abs(random(8, 1, 1)) + 1,
        "s": np.ones(8, np.float32),
        "c": np.arange(8) < 3,
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    text = (
        "agraph (float[1,8,8,8] x) => (float[] y) "
        f"{{ a = Conv(x, u) b = LeakyRelu(a) {middle} y = LeakyRelu(m) }}"
    )
    model = model_of(text, one=1.0, six=6.0, **constants)
    done = quantized(model, samples_for(model), pick=lambda unit: unit.site != "m")
    assert set(done.sites) == {"a", "b", "y"}
    return done


@pytest.mark.parametrize("middle", FLOAT.values(), ids=list(FLOAT))
def test_what_the_search_left_in_floats_runs_in_floats(middle: str) -> None:
    done = unchosen(middle)
    kernels = set(done.fusion.kernels)
    assert {name for name in kernels if name.startswith("QLinear")} == {"QLinearConv", "QLinearLeakyRelu"}
    # its readers take integers, as few as there are: both levels round alike
    step = float(done.plan.params["y"].scale)
    for one, two in zip(done.runs("none"), done.runs(), strict=True):
        np.testing.assert_allclose(one["y"], two["y"], atol=2.01 * step)


@pytest.mark.parametrize(("name", "middle"), FREE.items(), ids=list(FREE))
def test_an_integer_kernel_that_was_not_asked_for_gives_the_same_numbers(name: str, middle: str) -> None:
    """And takes no longer than the float kernel with its borders: nothing is put in its way."""
    done = unchosen(middle)
    assert done.fusion.kernels[f"QLinear{name}"] == 1 + (name == "LeakyRelu") * 2
    step = float(done.plan.params["y"].scale)
    for one, two in zip(done.runs("none"), done.runs(), strict=True):
        np.testing.assert_allclose(one["y"], two["y"], atol=2.01 * step)


READ = """
agraph (float[1,8,6] x, bool c) => (float[] y) {{
    a = LeakyRelu(x)
    s = {move}
    y = If(c) <
        then_branch = then () => (float[] t) {{ t = Neg(s) }},
        else_branch = other () => (float[] e) {{ e = Abs(s) }}
    >
}}
"""


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize(
    "move",
    [
        "Slice(a, i, j)",
        "Transpose(a)",
        "Reshape(a, k)",
        "Squeeze(a, i)",
        "Unsqueeze(a, i)",
        "MaxPool<kernel_shape = [2]>(a)",
    ],
)
def test_what_moves_numbers_into_a_body_does_not_end_the_process(move: str, chosen: bool) -> None:
    """QDQPropagation indexes the inputs of the If beyond their end."""
    ints = {"i": np.array([0]), "j": np.array([4]), "k": np.array([-1])}
    model = model_of(READ.format(move=move), **ints)
    feeds = [{"x": random(1, 8, 6), "c": np.array(flag)} for flag in (True, False)]
    done = quantized(model, feeds, pick=lambda u: chosen or u.site == "a")
    done.check()
    assert done.fusion.unfused == ()
    assert min(done.least_sqnr(), done.least_sqnr("none")) >= 35
