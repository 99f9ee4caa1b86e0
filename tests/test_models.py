"""The builders' models: valid, seeded, bounded, and doing what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from models import zoo
from models.bert import bert
from models.control_flow import control_flow
from models.digits_cnn import PATH, digits, digits_cnn
from models.llama import llama
from models.resnet20 import resnet20
from models.scale import big_model, chain, wide
from models.train_digits import gradients, initial, logits, to_onnx

Feeds = dict[str, np.ndarray]


def run(model: onnx.ModelProto | str, feeds: Feeds) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def token_feeds(batch: int, sequence: int, used: int) -> Feeds:
    ids = np.random.default_rng(1).integers(0, 1000, (batch, sequence))
    mask = np.zeros((batch, sequence), np.int64)
    mask[:, :used] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def llama_feeds(states: np.ndarray, past: int, caches: list[np.ndarray]) -> Feeds:
    batch, sequence, _ = states.shape
    place = np.arange(past, past + sequence)
    hidden = np.arange(past + sequence)[None, :] > place[:, None]
    return {
        "hidden_states": states,
        "position_ids": np.tile(place, (batch, 1)),
        "attention_mask": np.tile(np.where(hidden, np.float32(-1e9), np.float32(0)), (batch, 1, 1, 1)),
        "past_key.0": caches[0],
        "past_value.0": caches[1],
    }


@pytest.mark.parametrize(
    "build",
    [resnet20, bert, llama, control_flow, digits_cnn, lambda: chain(200), lambda: wide(200)],
    ids=["resnet20", "bert", "llama", "control_flow", "digits_cnn", "chain", "wide"],
)
def test_builders_are_valid_and_give_the_same_bytes(build: Callable[[], onnx.ModelProto]) -> None:
    model = build()
    onnx.checker.check_model(model, full_check=True)
    again = build().SerializeToString(deterministic=True)
    assert model.SerializeToString(deterministic=True) == again


def test_digits_cnn_is_trained_and_unfused() -> None:
    images, labels = digits(2000, seed=77)
    (scores,) = run(digits_cnn(), {"image": images})
    assert np.mean(scores.argmax(1) == labels) > 0.97
    assert [node.op_type for node in digits_cnn().graph.node].count("BatchNormalization") == 3
    assert PATH.stat().st_size < 200_000


def test_digits_are_seeded_and_in_their_range() -> None:
    images, labels = digits(500, seed=3)
    assert images.shape == (500, 1, 8, 8)
    assert set(labels) == set(range(10))
    assert np.abs(images).max() < 2
    np.testing.assert_array_equal(images, digits(500, seed=3)[0])
    assert not np.array_equal(images, digits(500, seed=4)[0])


def test_the_trainers_numpy_model_is_its_onnx_model() -> None:
    params = initial(seed=2)
    images, labels = digits(64, seed=2)
    for _ in range(3):
        gradients(params, images, labels)
    np.testing.assert_allclose(
        run(to_onnx(params), {"image": images})[0], logits(params, images), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["conv0.weight", "conv1.weight", "bn1.scale", "bn2.bias", "fc.weight"])
def test_the_trainers_gradients_are_those_of_its_loss(name: str) -> None:
    params = {key: value.astype(np.float64) for key, value in initial(seed=1).items()}
    images, labels = digits(16, seed=1)
    images = images.astype(np.float64)

    def loss() -> float:
        trial = {key: value.copy() for key, value in params.items()}
        for key in trial:  # a step of exponential averaging from these gives the batch's own statistics
            if key.endswith((".mean", ".var")):
                trial[key] = np.zeros_like(trial[key])
        gradients(trial, images, labels)
        for key in trial:
            if key.endswith((".mean", ".var")):
                trial[key] /= 0.1
        scores = logits(trial, images)
        scores -= scores.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(16), labels]))

    direction = np.random.default_rng(0).normal(size=params[name].shape)
    expected = float(
        (gradients({k: v.copy() for k, v in params.items()}, images, labels)[name] * direction).sum()
    )
    start, step = params[name].copy(), 1e-6
    params[name] = start + step * direction
    above = loss()
    params[name] = start - step * direction
    assert (above - loss()) / (2 * step) == pytest.approx(expected, rel=2e-3, abs=1e-6)


def test_resnet20_activations_neither_vanish_nor_explode() -> None:
    model = resnet20()
    for node in model.graph.node:
        if node.op_type == "Relu":
            model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
    scores, *activations = run(model, {"image": normal(4, 3, 32, 32)})
    assert len(activations) == 19
    assert all(0.05 < value.std() < 20 for value in activations)
    assert scores.std(0).min() > 1e-3


def test_bert_ignores_masked_tokens() -> None:
    model, feeds = bert(), token_feeds(2, 9, used=6)
    (first,) = run(model, feeds)
    feeds["input_ids"][:, 6:] = 7
    (second,) = run(model, feeds)
    np.testing.assert_allclose(first[:, :6], second[:, :6], atol=1e-5)
    assert not np.allclose(first[:, 6:], second[:, 6:])
    assert "LayerNormalization" not in {node.op_type for node in model.graph.node}


def test_llama_with_a_cache_is_llama_at_once() -> None:
    model, states = llama(), normal(2, 5, 64)
    empty = [np.zeros((2, 2, 0, 16), np.float32)] * 2
    whole, *_ = run(model, llama_feeds(states, 0, empty))
    _, *caches = run(model, llama_feeds(states[:, :3], 0, empty))
    rest, *longer = run(model, llama_feeds(states[:, 3:], 3, caches))
    np.testing.assert_allclose(rest, whole[:, 3:], rtol=1e-4, atol=1e-5)
    assert longer[0].shape == (2, 2, 5, 16)


@pytest.mark.parametrize("flip", [True, False])
def test_control_flow_is_what_numpy_makes_of_it(flip: bool) -> None:
    model, x = control_flow(), normal(4, 8)
    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    state, trace = x @ weight, []
    for _ in range(3):
        sums = np.cumsum(state + bias, axis=0)
        state = np.tanh(sums * sums[-1] if flip else state @ weight + state)
        trace.append(state)
    feeds = {"x": x, "steps": np.array(3), "flip": np.array(flip)}
    y, traced = run(model, feeds)
    np.testing.assert_allclose(y, state + bias, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(traced, np.stack(trace), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [chain, wide])
def test_scale_models_have_the_size_they_say_and_run(build: Callable[[int], onnx.ModelProto]) -> None:
    assert abs(len(build(20_000).graph.node) - 20_000) < 10
    (y,) = run(build(300), {"x": normal(2, 16)})
    assert np.isfinite(y).all()
    assert y.std() > 1e-3


def test_big_model_is_sparse_and_right(tmp_path: Path) -> None:
    path = big_model(tmp_path, gigabytes=0.25)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size == 8192 * 8192 * 4
    assert data.stat().st_blocks * 512 < 8e6
    onnx.checker.check_model(str(path))
    x = normal(1, 8192)
    (y,) = run(str(path), {"x": x})
    weight = np.memmap(data, np.float32, "r", shape=(8192, 8192))
    bias, scale = (
        onnx.numpy_helper.to_array(t) for t in onnx.load(path, load_external_data=False).graph.initializer[1:]
    )
    np.testing.assert_allclose(y, np.maximum(np.tanh((x @ weight + bias) * scale), 0), rtol=1e-3, atol=1e-4)
    assert y.std() > 0.1


@pytest.mark.slow
def test_big_model_above_two_gigabytes_runs(tmp_path: Path) -> None:
    path = big_model(tmp_path)
    assert (tmp_path / "model.onnx.data").stat().st_size > 2**31
    (y,) = run(str(path), {"x": normal(1, 8192)})
    assert np.isfinite(y).all()
    assert y.std() > 0.01


def test_zoo_index_is_complete() -> None:
    for entry in zoo.entries().values():
        assert len(bytes.fromhex(entry.sha256)) == 32
        assert entry.file.endswith(".onnx")
        assert entry.bytes > 0
        assert entry.licence


def test_zoo_names_what_it_knows() -> None:
    with pytest.raises(zoo.ZooError, match="no model 'nothing' in the zoo"):
        zoo.fetch("nothing")


@pytest.mark.slow
def test_zoo_fetches_once_and_checks(tmp_path: Path) -> None:
    path = zoo.fetch("ppocr_cls", tmp_path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == zoo.entries()["ppocr_cls"].sha256
    stamp = path.stat().st_mtime_ns
    assert zoo.fetch("ppocr_cls", tmp_path).stat().st_mtime_ns == stamp
