"""Calibration of small models: exact, in any order, in slices, resumed, and in shards."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxopt.calibration import Statistics, calibrate, exposable, running, split, spread
from onnxopt.calibration.exposing import Slices
from onnxopt.data import Feeds, Samples
from onnxopt.errors import UsageError
from tests.support import text_model

MODEL = """agraph (float[n, 4] x, int64[n] i) => (float[n, 4] y, int64[n] j)
<float[4] w = {1, -2, 3, -4}, bool yes = {1}> {
    a = Mul(x, w)
    b = Relu(a)
    c = If(yes) <then_branch = t () => (float[n, 4] d) { inner = Neg(a)
        d = Exp(inner) },
      else_branch = e () => (float[n, 4] d) { d = Identity(a) }>
    s = ReduceMean<keepdims = 0>(b)
    y = Sub(c, s)
    j = Neg(i)
}"""


def feeds(count: int = 7, seed: int = 0) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.standard_normal((n, 4)).astype(np.float32), "i": np.arange(n)}
        for n in rng.integers(1, 9, count)
    ]


def content(statistics: Statistics, folder: Path) -> bytes:
    file = folder / "content.npz"
    statistics.save(file)
    return file.read_bytes()


@pytest.fixture
def model() -> onnx.ModelProto:
    return text_model(MODEL)


def test_statistics_are_those_of_all_elements(model: onnx.ModelProto) -> None:
    samples = feeds()
    statistics = calibrate(model, samples, channels={"a": 1})
    assert tuple(statistics) == exposable(model) == ("x", "a", "b", "c", "s", "y")
    x = np.concatenate([sample["x"] for sample in samples])
    a = x * np.array([1, -2, 3, -4], np.float32)
    assert (statistics["a"].minimum, statistics["a"].maximum) == (a.min(), a.max())
    assert statistics["x"].count == statistics["b"].histogram.count == x.size
    assert statistics["b"].histogram.zeros == (a <= 0).sum()
    assert statistics["s"].count == statistics["s"].samples == len(samples)
    assert statistics["a"].channel is not None
    np.testing.assert_allclose(statistics["a"].channel.mean, a.astype(np.float64).mean(0), rtol=1e-12)
    assert statistics["x"].channel is None


def test_order_slices_and_merging_change_no_bit(model: onnx.ModelProto, tmp_path: Path) -> None:
    samples, out = feeds(), feeds(3, seed=1)
    want = content(calibrate(model, samples, held_out=out, channels={"c": 0 - 1}), tmp_path)
    reverse = calibrate(model, samples[::-1], held_out=out[::-1], channels={"c": -1}, memory=1)
    assert content(reverse, tmp_path) == want
    parts = [
        calibrate(model, samples[start::3], held_out=out[start::3], channels={"c": -1}) for start in range(3)
    ]
    assert content(parts[0].merge(parts[1]).merge(parts[2]), tmp_path) == want
    assert content(parts[2].merge(parts[0].merge(parts[1])), tmp_path) == want


def test_slices_fit_the_memory_at_the_largest_sample(model: onnx.ModelProto) -> None:
    slices = Slices(model, ["y", "x", "b", "s", "a"])
    sample = feeds()[0] | {"x": np.zeros((10, 4), np.float32)}  # 160 bytes a tensor, and s of 4
    assert slices.groups(sample, 320) == [("x",), ("y", "b"), ("s", "a")]
    assert slices.groups(sample, 1 << 20) == [("x",), ("y", "b", "s", "a")]
    assert slices.groups(sample, 1) == [("x",), ("y",), ("b",), ("s",), ("a",)]


def test_a_slice_has_only_the_nodes_it_needs(model: onnx.ModelProto) -> None:
    with Slices(model, None).runner(("b",)) as run:
        found = dict(run({"x": np.array([[1, 1, 1, 1]], np.float32), "i": np.array([0])}))
        assert sum(run.__self__.assignment.values()) == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found["b"], [[1, 0, 3, 0]])


def test_types_that_are_not_recorded_are_asked_of_the_runtime() -> None:
    proto = text_model("""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    agraph (float[n] x) => (float[n] y) {
        g = com.microsoft.Gelu(x)
        n = Shape(g)
        y = Neg(g)
    }""")
    assert exposable(proto) == ("x", "g", "y")


def test_names_that_are_taken_are_avoided() -> None:
    proto = text_model("agraph (float[n] x) => (float[n] z) { y = Neg(x)\n z = Neg(y) }")
    proto.graph.node[1].output[0] = proto.graph.output[0].name = "y/shape0"
    assert calibrate(proto, [{"x": np.ones(3, np.float32)}])["y"].count == 3


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["b", "z"], "tensor 'z' is not computed in the main graph"),
        (["inner"], "tensor 'inner' is not computed in the main graph"),
        (["w"], "tensor 'w' is not computed in the main graph"),
        (["j"], "tensor 'j' is int64: only float tensors are calibrated"),
    ],
)
def test_tensors_that_cannot_be_calibrated(model: onnx.ModelProto, names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        calibrate(model, feeds(), names)


def test_bad_arguments(model: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match="0 samples and 1 workers"):
        calibrate(model, [])
    with pytest.raises(UsageError, match="channels of tensor 'b', which is not calibrated"):
        calibrate(model, feeds(), ["a"], channels={"b": 0})
    with pytest.raises(UsageError, match=r"tensor 'a' of shape \(7, 4\) has no axis 2"):
        calibrate(model, feeds(1), ["a"], channels={"a": 2})
    with pytest.raises(UsageError, match=r"tensor 'a': .*channels are to be the same in all samples"):
        calibrate(model, feeds(), ["a"], channels={"a": 0})
    with pytest.raises(UsageError, match=r"unknown executor 'rayy' \(did you mean 'ray'\?\)"):
        calibrate(model, feeds(), workers=2, executor="rayy")  # type: ignore[arg-type]


def test_progress_comes_to_an_end(model: onnx.ModelProto) -> None:
    told: list[float | None] = []
    calibrate(model, feeds(2), ["a"], held_out=feeds(2), progress=lambda _, share: told.append(share))
    assert told == [0.25, 0.5, 0.75, 1.0]


class Watched(Sequence[Feeds]):
    """Samples that count how often they are read, and fail at a reading."""

    def __init__(self, samples: list[Feeds], fail_at: int = -1) -> None:
        self.samples, self.reads, self.fail_at = samples, 0, fail_at

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Feeds:  # type: ignore[override]
        self.reads += 1
        if self.reads == self.fail_at:
            raise KeyboardInterrupt
        return self.samples[index]


def test_a_killed_run_goes_on_and_a_finished_one_is_read(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_SAVE_S", 0.0)
    samples, cache = feeds(8), tmp_path / "cache"
    want = content(calibrate(model, samples, memory=200), tmp_path)
    slices = Slices(model, None)
    groups = len(slices.groups(max(samples, key=lambda sample: sample["x"].size), 200))
    assert groups > 2
    killed = Watched(samples, fail_at=8 + 1 + 8 + 8 + 5)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, killed, memory=200, cache=cache)
    resumed = Watched(samples)
    assert content(calibrate(model, resumed, memory=200, cache=cache), tmp_path) == want
    assert resumed.reads == 8 + 1 + 8 * groups - 20
    known = Watched(samples[::-1])
    assert content(calibrate(model, known, memory=300, cache=cache), tmp_path) == want
    assert known.reads == 8
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    assert content(calibrate(model, Watched(samples), cache=cache), tmp_path) == want
    assert content(Statistics.load(file), tmp_path) == want


def test_the_cache_tells_models_tensors_and_samples_apart(model: onnx.ModelProto, tmp_path: Path) -> None:
    samples = feeds(3)
    other = text_model(MODEL.replace("-4}", "-5}"))
    calibrate(model, samples, cache=tmp_path)
    calibrate(other, samples, cache=tmp_path)
    calibrate(model, samples, ["a"], cache=tmp_path)
    calibrate(model, samples, ["a"], channels={"a": 1}, cache=tmp_path)
    calibrate(model, samples[:2], cache=tmp_path)
    calibrate(model, samples[:2], held_out=samples[2:], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


def test_processes_share_the_samples(model: onnx.ModelProto, tmp_path: Path) -> None:
    samples, told = feeds(3), list[float | None]()
    want = content(calibrate(model, samples, held_out=feeds(1, seed=2)), tmp_path)
    found = calibrate(
        model,
        Samples(3, lambda index: samples[index]),
        held_out=feeds(1, seed=2),
        workers=2,
        cache=tmp_path / "cache",
        progress=lambda _, share: told.append(share),
    )
    assert content(found, tmp_path) == want
    assert told == [0.5, 1.0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_error_of_a_worker_is_the_callers(model: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match=r"tensor 'a' of shape \(7, 4\) has no axis 2"):
        calibrate(model, feeds(1), ["a"], channels={"a": 2}, workers=2)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_an_extra(model: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match=r"Ray is not installed: pip install 'onnxopt\[ray\]'"):
        calibrate(model, feeds(2), workers=2, executor="ray")


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'onnxopt[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("default")
def test_ray_tasks_share_the_samples(model: onnx.ModelProto, tmp_path: Path, local_ray: None) -> None:
    samples = feeds(5)
    want = content(calibrate(model, samples, held_out=samples[:2]), tmp_path)
    found = calibrate(model, samples, held_out=samples[:2], workers=2, executor="ray")
    assert content(found, tmp_path) == want
    with pytest.raises(UsageError, match="has no axis 2"):
        calibrate(model, samples, ["a"], channels={"a": 2}, workers=2, executor="ray")


def test_split_follows_the_content() -> None:
    samples = feeds(100)
    given, out = split(samples)
    assert len(given) + len(out) == 100
    assert 18 <= len(out) <= 42
    held = {sample["x"].tobytes() for sample in out}
    order = np.random.default_rng(0).permutation(100)
    again = {sample["x"].tobytes() for sample in split([samples[index] for index in order])[1]}
    assert again == held
    fewer = {sample["x"].tobytes() for sample in split(samples[:50])[1]}
    assert fewer == held & {sample["x"].tobytes() for sample in samples[:50]}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_split_leaves_neither_side_empty(share: float) -> None:
    for seed in range(10):
        given, out = split(feeds(2, seed), held_out=share)
        assert (len(given), len(out)) == (1, 1)
    alone = feeds(1)
    assert split(alone, held_out=share) == (alone, alone)
    same = feeds(1) * 3
    assert split(same, held_out=share) == (same, same)


@pytest.mark.parametrize(
    ("have", "asked", "found"),
    [(7, 3, [0, 2, 4]), (255, 128, None), (256, 128, None), (3, 8, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4])],
)
def test_so_many_samples_as_are_asked_for_from_all_over(
    have: int, asked: int, found: list[int] | None
) -> None:
    few = spread(Samples(have, lambda number: {"x": np.array(number)}), asked)
    numbers = [int(one["x"]) for one in few]
    assert len(numbers) == min(have, asked)
    assert set(np.diff(numbers)) <= {have // len(numbers), -(-have // len(numbers))}
    assert found is None or numbers == found


def test_of_no_samples_none_are_taken() -> None:
    assert len(spread((), 4)) == 0
