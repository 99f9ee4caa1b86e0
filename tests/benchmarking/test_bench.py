import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxopt.benchmarking import bench
from onnxopt.benchmarking.runner import bound
from onnxopt.errors import ModelError, ProviderError, UsageError
from onnxopt.runtimes import RunError, open_session, providers


def chain(length: int) -> onnx.ModelProto:
    """`length` products of 128 x 128 matrices that nothing can fold: X is the weight too."""
    names = ["x", *(f"h{i}" for i in range(1, length)), "y"]
    body = "\n".join(f"{b} = MatMul({a}, x)" for a, b in itertools.pairwise(names))
    text = (
        f'<ir_version: 8, opset_import: ["": 13]> g (float[128, 128] x) => (float[128, 128] y) {{ {body} }}'
    )
    return onnx.parser.parse_model(text)


FEEDS = [
    {"x": np.random.default_rng(seed).normal(0, 0.05, (128, 128)).astype(np.float32)} for seed in range(2)
]


def test_twice_the_work_is_slower_by_about_that() -> None:
    told: list[float] = []
    timing = bench(chain(6), chain(12), feeds=FEEDS, seconds=1.5, progress=told.append)
    assert timing.verdict == "slower"
    assert 1.6 < timing.ratio < 2.3
    assert timing.interval[0] <= timing.ratio <= timing.interval[1]
    assert 0.8 < timing.control_ratio < 1.25
    assert timing.after_ms / timing.before_ms == pytest.approx(timing.ratio, rel=0.3)
    assert timing.wall.before_ms.value > 0.8 * timing.cpu.before_ms.value
    assert (timing.provider, timing.threads, timing.clock) == ("cpu", 1, "CPU time")
    assert timing.open_before_ms > 0
    assert (timing.build_before_s, timing.build_after_s) == (None, None)
    assert timing.assignment_before == {"CPUExecutionProvider": 6}
    assert timing.assignment_after == {"CPUExecutionProvider": 12}
    assert timing.repeats >= 3
    assert timing.rounds >= 3
    assert timing.runtime.startswith("onnxruntime")
    assert told[-1] == 1.0
    assert json.loads(json.dumps(timing.to_dict()))["verdict"] == "slower"


def test_half_the_work_is_faster_whatever_kind_of_model_it_comes_as(tmp_path: Path) -> None:
    onnx.save(chain(12), tmp_path / "long.onnx")
    stream = io.BytesIO(chain(6).SerializeToString())
    timing = bench(tmp_path / "long.onnx", stream, feeds=FEEDS, seconds=0.8)
    assert timing.verdict == "faster"
    assert "x CPU time [" in timing.summary


def test_a_model_is_about_as_fast_as_itself() -> None:
    timing = bench(chain(4), chain(4), seconds=1.0, seed=1)
    assert 0.8 < timing.ratio < 1.25
    low, high = timing.blind_zone
    assert low <= 1 / 1.01
    assert high >= 1.01
    assert timing.seed == 1


def test_several_threads_are_judged_by_wall_time() -> None:
    timing = bench(chain(4), chain(4), feeds=FEEDS, threads=2, seconds=0.5)
    assert timing.clock == "wall time"
    assert timing.figures is timing.wall
    assert timing.cpu.before_ms.value > 0


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_cannot_run_is_an_error_and_never_a_cpu_number(provider: str) -> None:
    available = {found.name for found in providers() if found.available}
    if provider in available:
        assert bench(chain(2), chain(2), provider=provider, seconds=0.5).clock == "wall time"
        return
    with pytest.raises(ProviderError, match=provider) as raised:
        bench(chain(2), chain(2), provider=provider, feeds=FEEDS, seconds=0.5)
    assert raised.value.exit_code == 3


@pytest.mark.gpu
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_device_is_timed_by_wall_and_tensorrt_builds_apart(provider: str) -> None:
    timing = bench(chain(6), chain(48), provider=provider, feeds=FEEDS, seconds=3)
    assert timing.clock == "wall time"
    assert timing.verdict == "slower"
    assert (timing.build_before_s is not None) == (provider == "tensorrt")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"feeds": []}, UsageError),
        ({"seconds": 0}, UsageError),
        ({"threads": 0}, UsageError),
        ({"provider": "quantum"}, UsageError),
        ({"feeds": [{"x": np.ones((2, 2), np.float32)}]}, RunError),
    ],
)
def test_wrong_use_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        bench(chain(1), chain(1), **options)


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx"):
        bench(chain(1), tmp_path / "none.onnx", feeds=FEEDS)


class Spy:
    """A raw session that keeps the binding it gave."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def io_binding(self) -> Any:
        self.binding = self.raw.io_binding()
        return self.binding

    def run_with_iobinding(self, binding: Any) -> None:
        self.raw.run_with_iobinding(binding)


def test_bound_runs_give_the_same_numbers_in_memory_they_keep() -> None:
    session = open_session(chain(3))
    expected = session.run(FEEDS[0])["y"]
    spy = Spy(session.raw)
    session.raw = spy
    run = bound(session, FEEDS[0], "cpu")
    places = set()
    for _ in range(3):
        run()
        (output,) = spy.binding.get_outputs()
        places.add(output.data_ptr())
        np.testing.assert_array_equal(output.numpy(), expected)
    assert len(places) == 1


def test_what_cannot_be_bound_is_named() -> None:
    text = (
        '<ir_version: 8, opset_import: ["": 13]> g (string[2] words) => (string[2] y) { y = Identity(words) }'
    )
    session = open_session(onnx.parser.parse_model(text))
    with pytest.raises(UsageError, match="'words' is tensor"):
        bound(session, {"words": np.array(["a", "b"], object)}, "cuda")
