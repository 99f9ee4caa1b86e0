"""What keeps accuracy: exact in float, and on held-out samples less noise where it must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration import calibrate, choose_range
from onnxopt.data import Feeds
from onnxopt.model import clone
from onnxopt.protobuf import dump
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import emit, quantized_weight
from onnxopt.quantization.formats import dequantize, find_format
from onnxopt.quantization.keepers import KEEPERS
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.rounding import round_rows
from onnxopt.quantization.sensitivity import noise_between
from onnxopt.quantization.units import survey
from onnxopt.runtimes import open_session
from onnxopt.targets import PLACEMENTS
from tests.support import execute, sqnr, text_model

X86 = PLACEMENTS["x86"]
RNG = np.random.default_rng


def built(text: str, **constants: np.ndarray) -> ir.Model:
    """A model from text, whose constants are arrays."""
    proto = text_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in constants.items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert isinstance(model, ir.Model)
    return model


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return RNG(seed).standard_normal(shape).astype(np.float32)


def uneven(channels: int, seed: int = 0, decades: float = 1.5) -> np.ndarray:
    """Positive factors that differ by decades."""
    return (10 ** RNG(seed).uniform(-decades, decades, channels)).astype(np.float32)


def samples_of(*shape: int, count: int = 12, seed: int = 0) -> list[Feeds]:
    return [{"x": random(*shape, seed=seed + number)} for number in range(count)]


def draft_of(model: ir.Model, samples: Sequence[Feeds], method: str = "min-max") -> Draft:
    """With all units quantized."""
    statistics = calibrate(model, samples)
    form = find_format(X86.activation)
    found = {name: choose_range(one, method, form, symmetric=False) for name, one in statistics.items()}
    units = survey(model, X86, statistics).units
    params = params_of_tensors(units, {name: (one.low, one.high) for name, one in found.items()}, X86)
    tensors = frozenset(value.name or "" for unit in units for value in (*unit.sources, unit.output))
    plan = Plan(frozenset(unit.site for unit in units), tensors, params, find_format(X86.weight))
    return Draft(model, X86, plan, statistics, method)


def outputs_of(draft: Draft, samples: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    """Of the quantized model."""
    model = clone(draft.model)
    emit(model, survey(model, X86, draft.plan.params).units, draft.plan, X86)
    with open_session(model, level="none") as session:
        return [session.run(feeds) for feeds in samples]


def noise_of(draft: Draft, samples: Sequence[Feeds], original: ir.Model) -> float:
    """In dB."""
    with open_session(original) as session:
        expected = [session.run(feeds) for feeds in samples]
    return float(10 * np.log10(noise_between(expected, outputs_of(draft, samples))))


def kept(draft: Draft, name: str, samples: Sequence[Feeds]) -> Draft:
    before = dump(draft.model).SerializeToString()
    found = KEEPERS[name](draft, samples)
    assert found is not None
    assert dump(draft.model).SerializeToString() == before
    return found


def assert_same_numbers(before: ir.Model, after: ir.Model, feeds: Feeds) -> None:
    for want, have in zip(execute(before, feeds), execute(after, feeds), strict=True):
        assert sqnr(want, have) >= 100


CONVS = "agraph (float[1, 3, 12, 12] x) => (float[1, 4, h, w] y)"


def convolutions(middle: str, *, group: int = 1, seed: int = 0) -> ir.Model:
    """Two convolutions, the channels between which have ranges that differ by decades."""
    factors = uneven(16, seed)
    first = random(16, 3, 3, 3, seed=seed) * factors.reshape(-1, 1, 1, 1)
    second = random(4, 16 // group, 3, 3, seed=seed + 1)
    by_channel = np.repeat(factors.reshape(group, -1), 4 // group, 0).reshape(4, -1, 1, 1)
    text = f"{CONVS} {{ a = Conv(x, w, b) {middle} y = Conv<group = {group}, pads = [1, 1, 0, 0]>(z, v) }}"
    return built(text, w=first, b=random(16) * factors, v=(second / by_channel).astype(np.float32))


@pytest.mark.parametrize(
    "middle",
    [
        "z = Relu(a)",
        "z = LeakyRelu<alpha = 0.1>(a)",
        "r = Relu(a) z = MaxPool<kernel_shape = [2, 2]>(r)",
        "r = Relu(a) z = AveragePool<kernel_shape = [2, 2], pads = [1, 0, 0, 0]>(r)",
        "t = Constant<value_floats = [2.0, 3.0]>() z = Relu(a)",
    ],
)
@pytest.mark.parametrize("group", [1, 2])
def test_equalized_convolutions_are_the_same_in_float_and_lose_less_in_integers(
    middle: str, group: int
) -> None:
    model, samples, unseen = (
        convolutions(middle, group=group),
        samples_of(1, 3, 12, 12),
        samples_of(1, 3, 12, 12, seed=99),
    )
    draft = draft_of(model, samples)
    found = kept(draft, "equalize-layers", samples)
    assert_same_numbers(model, found.model, unseen[0])
    assert noise_of(found, unseen, model) < noise_of(draft, unseen, model) - 6


def test_equalizing_goes_through_depthwise_layers_and_constants_of_channels() -> None:
    factors = uneven(8).reshape(-1, 1, 1, 1)
    model = built(
        """agraph (float[1, 3, 12, 12] x) => (float[1, 4, h, w] y) {
            a = Conv(x, w) r = Relu(a) d = Conv<group = 8>(r, k) m = Mul(d, f) s = Add(m, c) z = Relu(s)
            y = Conv(z, v)
        }""",
        w=random(8, 3, 3, 3),
        k=random(8, 1, 3, 3, seed=1),
        f=factors[..., 0],
        c=random(1, 8, 1, 1, seed=3) * factors.reshape(1, 8, 1, 1),
        v=random(4, 8, 1, 1, seed=4) / factors.reshape(1, 8, 1, 1),
    )
    samples, unseen = samples_of(1, 3, 12, 12), samples_of(1, 3, 12, 12, seed=99)
    draft = draft_of(model, samples)
    found = kept(draft, "equalize-layers", samples)
    assert_same_numbers(model, found.model, unseen[0])
    assert noise_of(found, unseen, model) < noise_of(draft, unseen, model) - 6
    changed = {name for name in draft.statistics if draft.statistics[name] is not found.statistics[name]}
    assert changed >= {"m", "s", "z"}
    assert "d" not in changed  # the factor takes the scale


@pytest.mark.parametrize(
    "middle",
    [
        "low = Constant<value_float = 0.0>() high = Constant<value_float = 6.0>() z = Clip(a, low, high)",
        "z = HardSwish(a)",
        "s = Sigmoid(a) z = Mul(a, s)",
        "r = Relu(a) z = Add(r, a)",
        "one = Constant<value_float = 1.0>() z = Add(a, one)",
    ],
)
def test_what_is_not_homogeneous_is_not_equalized(middle: str) -> None:
    samples = samples_of(1, 3, 12, 12)
    assert KEEPERS["equalize-layers"](draft_of(convolutions(middle), samples), samples) is None


def test_a_tensor_that_others_read_is_not_equalized() -> None:
    text = f"{CONVS}, float[1, 16, 10, 10] z) {{ a = Conv(x, w) z = Relu(a) y = Conv(z, v) }}"
    model = built(
        text.replace("y), float", "y, float"),
        w=random(16, 3, 3, 3) * uneven(16).reshape(-1, 1, 1, 1),
        v=random(4, 16, 3, 3),
    )
    samples = samples_of(1, 3, 12, 12)
    assert KEEPERS["equalize-layers"](draft_of(model, samples), samples) is None


def test_what_is_broadcast_to_the_channels_is_not_equalized() -> None:
    text = f"{CONVS} {{ a = Conv(x, w) b = Add(a, c) z = Relu(b) y = Conv(z, v) }}"
    by_channel = uneven(16).reshape(1, 16, 1, 1)
    model = built(
        text, w=random(1, 3, 3, 3), c=random(1, 16, 1, 1) * by_channel, v=random(4, 16, 3, 3) / by_channel
    )
    samples = samples_of(1, 3, 12, 12)
    assert KEEPERS["equalize-layers"](draft_of(model, samples), samples) is None


def matrices(text: str, **constants: np.ndarray) -> ir.Model:
    return built(f"agraph (float[2, 6, 16] x) => (float[2, 6, 8] y) {{ {text} }}", **constants)


FACTORS = uneven(16)
SMOOTH = {
    "normalized": matrices(
        "n = LayerNormalization(x, s, b) y = MatMul(n, w)",
        s=FACTORS,
        b=random(16) * FACTORS,
        w=random(16, 8) / FACTORS[:, None],
    ),
    "multiplied": matrices(
        "m = Mul(x, s) n = Add(m, b) y = MatMul(n, w)",
        s=FACTORS,
        b=random(16) * FACTORS,
        w=random(16, 8) / FACTORS[:, None],
    ),
    "a layer": matrices(
        "m = MatMul(x, u) a = Add(b, m) n = Relu(a) y = MatMul(n, w)",
        u=random(16, 16, seed=1) * FACTORS,
        b=random(16) * FACTORS,
        w=random(16, 8) / FACTORS[:, None],
    ),
    "gemm": built(
        """agraph (float[6, 16] x) => (float[6, 8] y) {
            a = Gemm<transB = 1>(x, u, b) n = LeakyRelu(a) y = Gemm<transB = 1>(n, w)
        }""",
        u=random(16, 16, seed=1) * FACTORS[:, None],
        b=random(1, 16) * FACTORS,
        w=random(8, 16) / FACTORS,
    ),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smoothed_activations_are_the_same_in_float_and_lose_less_in_integers(name: str) -> None:
    model = SMOOTH[name]
    shape = tuple(d for d in model.graph.inputs[0].shape or () if isinstance(d, int))
    samples, unseen = samples_of(*shape), samples_of(*shape, seed=99)
    draft = draft_of(model, samples)
    found = kept(draft, "smooth-activations", samples)
    assert_same_numbers(model, found.model, unseen[0])
    assert noise_of(found, unseen, model) < noise_of(draft, unseen, model) - 6


@pytest.mark.parametrize(
    "text",
    [
        "n = LayerNormalization(x, s) m = MatMul(n, w) t = MatMul(n, n2) y = Add(m, t)",
        "n = LayerNormalization<axis = 1>(x, s2) y = MatMul(n, w)",
        "n = Softmax(x) y = MatMul(n, w)",
    ],
)
def test_what_cannot_be_smoothed_stays(text: str) -> None:
    constants = {"s": FACTORS, "s2": random(6, 16), "w": random(16, 8), "n2": random(2, 16, 8)}
    model = matrices(text, **{name: array for name, array in constants.items() if name in text})
    samples = samples_of(2, 6, 16)
    assert KEEPERS["smooth-activations"](draft_of(model, samples), samples) is None


def test_silent_channels_and_weights_are_no_trouble() -> None:
    silent = (np.arange(16) % 3 > 0).astype(np.float32)
    model = convolutions("z = Relu(a)")
    for name, shape in (("w", (-1, 1, 1, 1)), ("b", (-1,)), ("v", (1, -1, 1, 1))):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy() * silent.reshape(shape))
    samples, unseen = samples_of(1, 3, 12, 12), samples_of(1, 3, 12, 12, seed=99)
    draft = draft_of(model, samples)
    for name in ("equalize-layers", "round-weights", "correct-biases", "measure-biases"):
        draft = kept(draft, name, samples)
        assert_same_numbers(model, draft.model, unseen[0])
    assert noise_of(draft, unseen, model) < -28


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 90),
    st.integers(1, 60),
    st.integers(0, 9),
    st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rounding_by_moments_is_never_worse_than_to_nearest(
    groups: int, rows: int, summands: int, samples: int, seed: int, dead: bool
) -> None:
    x = RNG(seed).standard_normal((groups, samples, summands)) @ RNG(seed + 1).standard_normal(
        (summands, summands)
    )
    x[..., 0] *= not dead
    moments = x.swapaxes(1, 2) @ x
    target = RNG(seed + 2).normal(0, 4, (groups, rows, summands))
    found = round_rows(target, np.ones(1), moments, -7, 7)
    assert (found == np.rint(found)).all()
    assert np.abs(found).max() <= 7
    losses = [(((w - target) @ x.swapaxes(1, 2)) ** 2).sum(-1) for w in (found, np.rint(target).clip(-7, 7))]
    assert (losses[0] <= losses[1] * (1 + 1e-9) + 1e-9).all()


def test_rounding_by_moments_uses_that_inputs_go_together() -> None:
    x = np.repeat(random(200, 8), 8, axis=1) + 0.1 * random(200, 64, seed=1)
    target = random(1, 50, 64, seed=2).astype(np.float64) * 30
    found = round_rows(target, np.ones(1), (x.T @ x)[None].astype(np.float64), -127, 127)
    losses = [(((w - target)[0] @ x.T) ** 2).mean() for w in (found, np.rint(target))]
    assert losses[0] < losses[1] / 4


def chain(seed: int = 0) -> ir.Model:
    """Layers of all kinds, with inputs whose channels go together."""
    return built(
        """agraph (float[2, 3, 9, 9] x) => (float[2, 5] y) {
            a = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(a) d = Conv<group = 8, strides = [2, 2]>(r, k)
            p = Relu(d) g = Conv<group = 2>(p, q) m = GlobalAveragePool(g) f = Flatten(m)
            h = MatMul(f, u) y = Gemm<transB = 1>(h, v, c)
        }""",
        w=random(8, 3, 3, 3, seed=seed),
        b=random(8, seed=1) + 1,
        k=random(8, 1, 3, 3, seed=2),
        q=random(6, 4, 2, 2, seed=3),
        u=random(6, 7, seed=4),
        v=random(5, 7, seed=5),
        c=random(5, seed=6),
    )


def smooth_images(count: int, seed: int = 0) -> list[Feeds]:
    return [
        {"x": np.abs(random(2, 1, 9, 9, seed=seed + n)) + 0.3 * random(2, 3, 9, 9, seed=n)}
        for n in range(count)
    ]


def few_bits(draft: Draft) -> Draft:
    """With weights that are at most 7 steps from zero, so that their noise is most of all."""
    return replace(draft, plan=replace(draft.plan, weight=replace(find_format("int8"), low=-8, high=7)))


def test_rounded_weights_lose_less_on_samples_that_were_not_seen() -> None:
    model, samples, unseen = chain(), smooth_images(12), smooth_images(12, seed=99)
    draft = few_bits(draft_of(model, samples))
    found = kept(draft, "round-weights", samples)
    assert list(found.plan.rounded) == [unit.site for unit in draft.units() if unit.is_layer]
    for unit in draft.units():
        if unit.is_layer:
            ints, params = quantized_weight(unit, draft.plan, draft.plan.params[unit.sources[0].name or ""])
            rounded, same = found.plan.rounded[unit.site]
            assert (rounded.dtype, rounded.shape) == (ints.dtype, ints.shape)
            assert np.abs(rounded).max() <= 7
            np.testing.assert_array_equal(params.scale, same.scale)
    assert noise_of(found, unseen, model) < noise_of(draft, unseen, model) - 3


def test_weights_are_rounded_the_same_each_time() -> None:
    samples = smooth_images(3)
    first, second = (
        kept(draft_of(chain(), samples), "round-weights", samples).plan.rounded for _ in range(2)
    )
    for site, (ints, _) in first.items():
        np.testing.assert_array_equal(ints, second[site][0])


def test_layers_of_very_many_summands_are_not_rounded() -> None:
    model = built("agraph (float[1, 2049] x) => (float[1, 2] y) { y = MatMul(x, w) }", w=random(2049, 2))
    samples = samples_of(1, 2049, count=2)
    assert KEEPERS["round-weights"](draft_of(model, samples), samples) is None


def test_a_corrected_bias_brings_the_mean_of_a_product_back() -> None:
    model = built("agraph (float[8, 16] x) => (float[8, 4] y) { y = Gemm(x, w) }", w=random(16, 4))
    samples: list[Feeds] = [{"x": random(8, 16, seed=n) + 1} for n in range(6)]
    draft = few_bits(draft_of(model, samples))
    [unit] = draft.units()
    found = kept(draft, "correct-biases", samples)
    error = dequantize(*quantized_weight(unit, draft.plan, None)) - random(16, 4)
    mean = np.mean([feeds["x"] for feeds in samples], (0, 1))
    np.testing.assert_allclose(found.plan.biases["y"], -mean @ error, rtol=1e-4, atol=1e-6)
    again = kept(found, "correct-biases", samples)
    np.testing.assert_array_equal(again.plan.biases["y"], found.plan.biases["y"])


@pytest.mark.parametrize("name", ["correct-biases", "measure-biases"])
def test_corrected_biases_lose_less_on_samples_that_were_not_seen(name: str) -> None:
    model, samples, unseen = chain(), smooth_images(12), smooth_images(12, seed=99)
    draft = few_bits(draft_of(model, samples))
    found = kept(draft, name, samples)
    assert noise_of(found, unseen, model) < noise_of(draft, unseen, model) - 2


def test_measured_biases_bring_back_the_mean_of_what_a_model_writes() -> None:
    model, samples = chain(), smooth_images(8)
    draft = few_bits(draft_of(model, samples))
    with open_session(model) as session:
        expected = np.mean([session.run(feeds)["y"] for feeds in samples], (0, 1))
    before, after = (
        np.mean([one["y"] for one in outputs_of(each, samples)], (0, 1)) - expected
        for each in (draft, kept(draft, "measure-biases", samples))
    )
    assert np.abs(after).max() < np.abs(before).max() / 5


@pytest.mark.parametrize("name", KEEPERS)
def test_without_layers_there_is_nothing_to_do(name: str) -> None:
    model = built("agraph (float[1, 4] x) => (float[1, 4] y) { y = Sigmoid(x) }")
    samples = samples_of(1, 4, count=2)
    assert KEEPERS[name](draft_of(model, samples), samples) is None
