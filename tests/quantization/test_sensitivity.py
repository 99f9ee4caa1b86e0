"""Noise of a source alone, against a model in which only that source is quantized, made by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.calibration import calibrate
from onnxopt.data import Feeds
from onnxopt.quantization import sensitivity as module
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import dequantize, find_format, quantize
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.sensitivity import (
    Noise,
    Source,
    measure_sensitivity,
    noise_between,
    sources_of,
)
from onnxopt.quantization.units import survey
from onnxopt.runtimes import open_session
from onnxopt.targets import PLACEMENTS
from tests.support import text_model

X86 = PLACEMENTS["x86"]
RNG = np.random.default_rng(3)
SAMPLES: list[Feeds] = [{"x": RNG.standard_normal((1, 4, 6, 6)).astype(np.float32)} for _ in range(3)]


def weight(name: str) -> str:
    return f"float[4,4,1,1] {name} = {{{', '.join(f'{x:.5f}' for x in RNG.standard_normal(16))}}}"


NET = f"""agraph (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] early, int64[1,1,6,6] best)
    <{weight("w0")}, {weight("w1")}, {weight("w2")},
    float[4] b = {{1, 0, -1, 0.5}}, float[1] half = {{0.57}}> {{
    a = Conv(x, w0, b)
    early = Relu(a)
    c = Conv(early, w1)
    d = Sigmoid(c)
    e = Mul(c, d)
    g = Mul(e, half)
    f = Conv(g, w2)
    y = Add(f, early)
    best = ArgMax <axis = 1> (y)
}}"""

BODY = f"""agraph (float[1,4,6,6] x, bool on) => (float[1,4,6,6] y)
    <{weight("w0")}, {weight("w1")}> {{
    a = Conv(x, w0)
    c = Conv(a, w1)
    y = If (on) <then_branch = t () => (float[1,4,6,6] p) {{ p = Add(a, c) }},
                 else_branch = e () => (float[1,4,6,6] q) {{ q = Sub(a, c) }}>
}}"""

SEQUENCE = f"""agraph (float[1,4,6,6] x) => (float[1,4,6,6] y, float[1,4,6,6] s1)
    <{weight("w0")}, {weight("w1")}, int64 first = {{0}}, int64 second = {{1}}> {{
    a = Conv(x, w0)
    s = SequenceConstruct(a, x)
    c = Conv(a, w1)
    s0 = SequenceAt(s, first)
    s1 = SequenceAt(s, second)
    y = Add(c, s0)
}}"""


def built(text: str) -> ir.Model:
    return ir.from_proto(text_model(text))


def plan_for(model: ir.Model, samples: Sequence[Feeds], names: Sequence[str]) -> Plan:
    statistics = calibrate(model, samples, names)
    units = survey(model, X86, names).units
    ranges = {name: (statistics[name].minimum, statistics[name].maximum) for name in names}
    return Plan(frozenset(), frozenset(), params_of_tensors(units, ranges, X86), find_format("int8"))


def outputs_of(model: ir.Model, samples: Sequence[Feeds]) -> list[dict[str, Any]]:
    with open_session(model) as session:
        return [session.run(feeds) for feeds in samples]


def by_hand(text: str, source: Source, plan: Plan, samples: Sequence[Feeds]) -> float:
    """Each sample run with the source replaced: a weight in the model, a tensor by an input of that name."""
    model = built(text)
    expected = outputs_of(built(text), samples)
    if source.kind == "weight":
        unit = next(u for u in survey(model, X86, plan.params).units if u.site == source.name)
        assert unit.weight is not None
        weight = unit.node.inputs[unit.weight]
        assert weight is not None
        weight.const_value = ir.Tensor(dequantize(*quantized_weight(unit, plan, None)), name=weight.name)
        return noise_between(expected, outputs_of(model, samples))
    params = plan.params[source.name]
    if source.name in samples[0]:
        moved = [
            {**feeds, source.name: dequantize(quantize(feeds[source.name], params), params)}
            for feeds in samples
        ]
        return noise_between(expected, outputs_of(model, moved))
    exposed = built(text)
    value = next(v for node in exposed.graph for v in node.outputs if v.name == source.name)
    exposed.graph.outputs[:] = [value]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    seen = [one[source.name] for one in outputs_of(exposed, samples)]
    inner = next(v for node in model.graph for v in node.outputs if v.name == source.name)
    name = f"{source.name}_fed"
    fed = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    inner.replace_all_uses_with(fed, replace_graph_outputs=True)
    model.graph.inputs.append(fed)
    moved = [
        {**feeds, name: dequantize(quantize(array, params), params)}
        for feeds, array in zip(samples, seen, strict=True)
    ]
    found = [
        {(source.name if key == name else key): array for key, array in one.items()}
        for one in outputs_of(model, moved)
    ]
    return noise_between(expected, found)


@pytest.mark.parametrize("segments", [1, 3, 100])
def test_the_noise_of_each_source_is_that_of_a_model_with_it_alone(
    segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", segments)
    model = built(NET)
    names = ["x", "a", "early", "c", "d", "e", "g", "f", "y"]
    plan = plan_for(model, SAMPLES, names)
    shares: list[float] = []
    found = measure_sensitivity(model, X86, plan, SAMPLES, progress=shares.append)
    assert set(found) == {
        *(Source("tensor", name) for name in ("x", "early", "c", "d", "e", "g", "f", "y")),
        *(Source("weight", site) for site in ("a", "c", "g", "f")),
    }
    for source, noise in found.items():
        assert noise == pytest.approx(by_hand(NET, source, plan, SAMPLES), rel=1e-3, abs=1e-9), source
        assert noise > 0 or source == Source("weight", "g")  # a scalar is exact
    assert shares == [number / len(found) for number in range(1, len(found) + 1)]
    assert [value.name for value in model.graph.inputs] == ["x"]


@pytest.mark.parametrize("segments", [1, 2, 100])
def test_values_that_bodies_read_are_sources_too(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SEGMENTS", segments)
    model = built(BODY)
    samples: list[Feeds] = [
        {**feeds, "on": np.array(number % 2 == 0)} for number, feeds in enumerate(SAMPLES)
    ]
    plan = plan_for(model, samples, ["x", "a", "c"])
    found = measure_sensitivity(model, X86, plan, samples)
    assert len(found) == 5
    for source in (Source("weight", "a"), Source("weight", "c"), Source("tensor", "x")):
        assert found[source] == pytest.approx(by_hand(BODY, source, plan, samples), rel=1e-3)
    assert found[Source("tensor", "a")] > 0


def test_corrected_biases_belong_to_the_weight() -> None:
    model = built(NET)
    plan = plan_for(model, SAMPLES, ["x", "a", "early", "c", "d", "e", "g", "f", "y"])
    moved = replace(plan, biases={"a": np.array([3, 0, -1, 0.5], np.float32)})
    before, after = (measure_sensitivity(model, X86, one, SAMPLES) for one in (plan, moved))
    different = {source for source in before if not math.isclose(before[source], after[source], rel_tol=1e-6)}
    assert different == {Source("weight", "a")}
    assert after[Source("weight", "a")] > 10 * before[Source("weight", "a")]


def test_a_sequence_that_all_segments_need_makes_one_of_them() -> None:
    model = built(SEQUENCE)
    plan = plan_for(model, SAMPLES, ["x", "a", "c", "y"])
    found = measure_sensitivity(model, X86, plan, SAMPLES)
    for name in ("a", "c"):
        source = Source("weight", name)
        assert found[source] == pytest.approx(by_hand(SEQUENCE, source, plan, SAMPLES), rel=1e-3)


def noise(before: Any, after: Any) -> float:
    return noise_between([{"y": before}], [{"y": after}])


A = np.array([[3.0, 4.0]], np.float32)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (A, A, 0.0),
        (A, A + np.float32(1), 2 / 25),
        (A, np.zeros_like(A), 1.0),
        (np.zeros_like(A), np.zeros_like(A), 0.0),
        (np.zeros_like(A), A, 1.0),
        (A, np.ones((1, 3), np.float32), 1.0),
        (np.array([3, np.nan, 4], np.float32), np.array([3, np.nan, 4], np.float32), 0.0),
        (np.array([3, -np.inf, 4], np.float32), np.array([4, -np.inf, 4], np.float32), 1 / 25),
        (A, np.array([[3.0, np.nan]], np.float32), math.inf),
        (np.array([[3.0, np.inf]], np.float32), A, math.inf),
        (np.array([[np.inf, 3.0]], np.float32), np.array([[-np.inf, 3.0]], np.float32), math.inf),
        (np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), 0.25),
        (np.array(["a", "b"], object), np.array(["a", "c"], object), 0.5),
        (np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), 0.0),
        (np.zeros(0, np.int64), np.zeros(0, np.int64), 0.0),
        ([A, A], [A, A + np.float32(1)], 2 / 25),
        ([A, A], [A], 1.0),
        (None, None, 0.0),
        (None, A, 1.0),
        (A.astype(np.float16), (A + 1).astype(np.float16), 2 / 25),
    ],
)
def test_noise_is_error_over_signal(before: Any, after: Any, expected: float) -> None:
    assert noise(before, after) == pytest.approx(expected)


def test_noise_adds_over_outputs_and_is_a_mean_over_samples() -> None:
    one, two = {"y": A, "z": 2 * A}, {"y": A, "z": A}
    other = {"y": A + np.float32(1), "z": 2 * A + np.float32(1)}
    assert noise_between([one, two], [other, two]) == pytest.approx((2 / 25 + 2 / 100) / 2)
    assert noise_between([one], [{"z": other["z"]}]) == pytest.approx(2 / 100)


def test_noise_is_measured_once_and_not_before_it_is_asked_for() -> None:
    sources = [Source("tensor", name) for name in ("x", "y", "z")]
    asked: list[Source] = []

    def measure(some: Sequence[Source]) -> dict[Source, float]:
        asked.extend(some)
        return dict.fromkeys(some, 1.0)

    noise = Noise(sources, measure)
    assert (noise.known, asked) == ({}, [])
    assert noise({sources[1], Source("tensor", "other")}) == {sources[1]: 1.0}
    assert set(noise()) == set(noise()) == set(sources)
    assert asked == [sources[1], sources[0], sources[2]]


def test_some_sources_alone_are_measured_as_among_all() -> None:
    model = built(NET)
    plan = plan_for(model, SAMPLES, ["x", "a", "early", "c", "d", "e", "g", "f", "y"])
    some = {Source("tensor", "e"), Source("weight", "c")}
    every, found = (measure_sensitivity(model, X86, plan, SAMPLES, one) for one in (None, some))
    assert set(found) == some
    assert set(every) == set(sources_of(survey(model, X86, plan.params).units))
    for source in some:
        assert found[source] == pytest.approx(every[source], rel=1e-4)
