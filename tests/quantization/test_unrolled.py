"""State that a model carries: how it is told, and runs that carry it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.data import Feeds
from onnxopt.quantization.bounds import SCORES_DB, SIGNALS_DB, required_db
from onnxopt.quantization.judge import Judge
from onnxopt.quantization.unrolled import STEPS, run_all, states_of
from tests.support import text_model


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        (
            {"x": (1, 8), "h": (1, 4), "c": (1, 4)},
            {"y": (1, 8), "hn": (1, 4), "cn": (1, 4)},
            {"h": "hn", "c": "cn"},
        ),
        ({"x": (1, 8), "h": (1, 4)}, {"y": (1, 4), "hn": (1, 4)}, {"h": "hn"}),
        (
            {"x": (1, 8), "h": (1, 4), "k": (2, 3)},
            {"y": (1,), "n": (2, 3), "m": (1, 4)},
            {"h": "m", "k": "n"},
        ),
        ({"left": (1, 8), "right": (1, 8)}, {"a": (1, 8), "b": (1, 8)}, {}),
        ({"x": (1, 8), "h": (1, 4)}, {"hn": (1, 4), "y": (1, 8)}, {}),
        ({"x": (1, 8), "h": (1, 4), "c": (1, 4)}, {"y": (1, 8), "hn": (1, 4)}, {}),
        ({"x": (1, 8), "gain": (1,)}, {"y": (1, 8), "level": (1,)}, {}),
        ({"x": (1, 8)}, {"y": (1, 8)}, {}),
    ],
)
def test_states_are_told_by_their_shapes(
    inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]], expected: dict[str, str]
) -> None:
    assert states_of(arrays(**inputs), arrays(**outputs)) == expected


def test_integers_are_neither_signals_nor_states() -> None:
    ids = {"ids": np.ones((1, 4), np.int64)}
    assert states_of(ids | arrays(x=(1, 8), h=(1, 4)), arrays(y=(1,), n=(1, 4))) == {"h": "n"}
    assert states_of(arrays(x=(1, 8)) | ids, arrays(y=(1,)) | {"n": ids["ids"]}) == {}


@pytest.mark.parametrize(("samples", "runs"), [(1, STEPS), (STEPS, STEPS), (STEPS + 1, 2 * STEPS)])
def test_state_is_carried_over_so_many_steps(samples: int, runs: int) -> None:
    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": feeds["x"] + feeds["h"].sum(), "n": feeds["h"] + 1}

    given: list[Feeds] = [{"x": np.array([n]), "h": np.full((1, 2), 100.0 * n)} for n in range(samples)]
    found = [float(outputs["n"][0, 0]) for outputs in run_all(run, given, {"h": "n"})]
    begun = [100.0 * (number % samples) for number in range(0, runs, STEPS)]
    assert found == [start + step + 1 for start in begun for step in range(STEPS)]
    assert len([*run_all(run, given, {})]) == samples


def test_state_of_another_shape_does_not_go_on() -> None:
    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"y": feeds["h"].sum(keepdims=True), "n": feeds["h"] + 1}

    given: list[Feeds] = [{"x": np.zeros(1), "h": np.zeros((1, 2 + n % 2))} for n in range(STEPS)]
    assert [float(outputs["y"].sum()) for outputs in run_all(run, given, {"h": "n"})] == [0.0] * STEPS


def test_outputs_beside_known_states_are_judged_as_any() -> None:
    feeds = arrays(x=(1, 16), s=(1, 400))
    outputs = arrays(level=(1, 1), sound=(1, 16), next=(1, 400))
    model = ir.from_proto(text_model("agraph (float[1] x) => (float[1] y) { y = Neg(x) }"))
    bounds = required_db(model, feeds, outputs, {"s": "next"})
    assert bounds == {"level": SCORES_DB, "sound": SIGNALS_DB, "next": SCORES_DB}


def leaky(gain: float) -> ir.Model:
    """The state is a sum that leaks a tenth and more in each step."""
    text = f"""agraph (float[1,16] x, float[1,4] s) => (float[1,1] level, float[1,4] next) {{
        kept = Constant<value_float = {gain}>()
        axes = Constant<value_ints = [1]>()
        level = ReduceSum(s, axes)
        mean = ReduceMean<axes = [1]>(x)
        old = Mul(s, kept)
        next = Add(old, mean)
    }}"""
    return ir.from_proto(text_model(text))


def test_errors_of_a_state_are_seen_in_the_outputs_of_later_steps() -> None:
    """A single step shows none in `level`, which reads the state alone, and few in `next`: they add up."""
    samples: list[Feeds] = [arrays(x=(1, 16)) | {"s": np.zeros((1, 4), np.float32)} for _ in range(3)]
    before, after = ([sum(gain**k for k in range(step)) for step in range(STEPS + 1)] for gain in (0.9, 0.8))
    signal, noise = (
        np.array([sum(one[:STEPS]), sum(one[1:])])
        for one in (np.square(before), np.square(np.subtract(before, after)))
    )
    level, state = 10 * np.log10(signal / noise)
    found = Judge(leaky(0.9), samples)(leaky(0.8))
    assert not found.ok
    assert found.score == pytest.approx(min(level, state) - SCORES_DB, abs=1e-3)
    assert found.summary.endswith(f"on 3 held-out samples, state carried over {STEPS} steps")
    assert Judge(leaky(0.9), samples)(leaky(0.895)).ok
