import dataclasses
import json
from typing import Any

import pytest

from onnxopt.benchmarking import Estimate, Figures, Timing

STILL = Estimate(1.001, 0.997, 1.004)
MS = Estimate(2.0, 1.9, 2.1)


def timing(ratio: Estimate, control: Estimate = STILL, **changes: Any) -> Timing:
    figures = Figures(ratio, control, MS, MS)
    result = Timing(
        provider="cpu",
        threads=1,
        clock="CPU time",
        cpu=figures,
        wall=Figures(MS, STILL, MS, MS),
        open_before_ms=10.0,
        open_after_ms=9.0,
        build_before_s=None,
        build_after_s=None,
        repeats=20,
        rounds=10,
        batch=4,
        seed=0,
        session_config={},
        runtime="onnxruntime 1.31.1",
        machine="a processor",
        cores=2,
        assignment_before={"CPUExecutionProvider": 9},
        assignment_after={"CPUExecutionProvider": 7},
        load_average=(1.0, None),
    )
    return dataclasses.replace(result, **changes)


@pytest.mark.parametrize(
    ("ratio", "control", "verdict"),
    [
        (Estimate(0.5, 0.49, 0.51), STILL, "faster"),
        (Estimate(1.5, 1.4, 1.6), STILL, "slower"),
        (Estimate(1.0, 0.99, 1.01), STILL, "no measurable difference"),
        # the interval clears 1 and the control, not the floor of 1 %
        (Estimate(0.994, 0.993, 0.995), STILL, "no measurable difference"),
        (Estimate(0.985, 0.981, 0.989), STILL, "faster"),
        (Estimate(1.015, 1.011, 1.019), STILL, "slower"),
        # a large gain with an interval that reaches the floor
        (Estimate(0.8, 0.6, 0.995), STILL, "no measurable difference"),
        # the control wanders by 6 %: upwards, but 5 % downwards says nothing either
        (Estimate(0.95, 0.948, 0.952), Estimate(1.005, 0.99, 1.06), "no measurable difference"),
        (Estimate(0.9, 0.89, 0.91), Estimate(1.005, 0.99, 1.06), "faster"),
        # the original strays from itself by 1.5 %: nothing below 3 %
        (Estimate(0.975, 0.974, 0.976), Estimate(1.015, 1.01, 1.02), "no measurable difference"),
        (Estimate(0.965, 0.964, 0.966), Estimate(1.015, 1.01, 1.02), "faster"),
    ],
)
def test_only_an_interval_outside_the_blind_zone_claims(
    ratio: Estimate, control: Estimate, verdict: str
) -> None:
    assert timing(ratio, control).verdict == verdict


@pytest.mark.parametrize("few", [{"repeats": 2}, {"rounds": 2}])
def test_few_samples_raise_the_floor_and_are_said(few: dict[str, Any]) -> None:
    result = timing(Estimate(0.98, 0.979, 0.981), **few)
    assert result.verdict == "no measurable difference"
    assert result.blind_zone == pytest.approx((1 / 1.03, 1.03))
    assert result.summary.endswith("; few samples")
    assert timing(Estimate(0.9, 0.89, 0.91), **few).verdict == "faster"


def test_summary_is_one_line() -> None:
    result = timing(Estimate(0.5, 0.49, 0.51))
    assert result.summary == (
        "faster: 0.500x CPU time [0.490, 0.510], control 1.001x [0.997, 1.004], 2 ms before, 2 ms after"
    )


def test_the_verdict_reads_the_clock_it_names() -> None:
    result = timing(Estimate(0.5, 0.49, 0.51), clock="wall time")
    assert result.figures is result.wall
    assert (result.ratio, result.interval) == (2.0, (1.9, 2.1))
    assert (result.control_ratio, result.control_interval) == (1.001, (0.997, 1.004))
    assert result.verdict == "slower"
    assert "2.000x wall time [1.900, 2.100]" in result.summary


def test_nodes_that_a_device_left_on_the_cpu_are_said() -> None:
    nodes = {"CUDAExecutionProvider": 117, "CPUExecutionProvider": 3}
    ratio = Estimate(0.5, 0.49, 0.51)
    assert timing(ratio, provider="cuda", assignment_after=nodes).summary.endswith(
        "; 3 of 120 nodes on the CPU"
    )
    assert timing(ratio, assignment_after={"CPUExecutionProvider": 7}).summary.endswith("ms after")


def test_dictionary_is_json_and_carries_the_verdict() -> None:
    result = timing(Estimate(0.5, 0.49, 0.51))
    read = json.loads(json.dumps(result.to_dict()))
    assert read == {**result.to_dict(), "load_average": [1.0, None]}
    assert read["verdict"] == "faster"
    assert read["cpu"]["ratio"] == {"value": 0.5, "low": 0.49, "high": 0.51}
    assert read["blind_zone"] == pytest.approx([1 / 1.01, 1.01])


def test_session_settings_are_said() -> None:
    usual = timing(Estimate(0.5, 0.49, 0.51))
    assert "with session settings" not in usual.summary
    assert "; with session settings" in dataclasses.replace(usual, session_config={"a": "1"}).summary
