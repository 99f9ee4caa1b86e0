"""Learning from teachers: closed forms, hidden tensors, several teachers, no labels, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

import onnxopt
from models.digits_cnn import digits, digits_cnn
from onnxopt.cli import main
from onnxopt.data.contract import contract_of
from onnxopt.errors import ModelError, OnnxoptError, UsageError
from onnxopt.model import load
from onnxopt.training import DistillRecipe, distill, to_torch
from onnxopt.training.distillation import Distiller
from onnxopt.training.loop.parallel import World
from onnxopt.training.teachers import Teacher, looks_random
from tests.support import execute, text_model
from tests.training.support import dataset

IMAGES, LABELS = digits(512, 1)
SEEN, TRUTH = digits(400, 2)


@pytest.fixture(name="half", scope="module")
def half_of_the_digits() -> ir.Model:
    return onnxopt.prune(digits_cnn(), "prune-channels{macs=0.4}", bench=False).graph


def accuracy(model: ir.Model) -> float:
    (logits,) = execute(ir.to_proto(model), {"image": SEEN})
    return float((logits.argmax(1) == TRUTH).mean())


def filled(proto: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The model with random numbers for the weights that are only declared."""
    rng = np.random.default_rng(seed)
    for one in proto.graph.value_info:
        shape = [dim.dim_value for dim in one.type.tensor_type.shape.dim]
        array = rng.normal(size=shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, one.name))
    del proto.graph.value_info[:]
    return proto


def net(seed: int, width: int, final: str = "Softmax") -> onnx.ModelProto:
    """x (n, 6) -> hidden (n, width) -> y (n, 4), with random weights."""
    proto = text_model(
        f"agraph (float[n, 6] x) => (float[n, 4] y) <float[6, {width}] w1, float[{width}, 4] w2> {{"
        f"m = MatMul(x, w1) hidden = Tanh(m) z = MatMul(hidden, w2) y = {final}(z) }}"
    )
    return filled(proto, seed)


X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


def started(student: onnx.ModelProto, teachers: Any, **options: Any) -> tuple[Distiller, Any]:
    """A distiller that is ready, and the module that it trains."""
    model = load(student)
    recipe = DistillRecipe(teacher=teachers, **options)
    one, module = Distiller(recipe, model), to_torch(model)
    data = dataset({"x": X}, contract_of(model), labels=())
    trainer: Any = SimpleNamespace(module=module, world=World(torch.device("cpu")), data=data)
    one.start(trainer)
    return one, module


def loss_of(student: onnx.ModelProto, teachers: Any, **options: Any) -> np.ndarray:
    one, module = started(student, teachers, **options)
    arrays = {"x": torch.from_numpy(X)}
    found: np.ndarray = one.loss(SimpleNamespace(), module(arrays), arrays).detach().numpy()  # type: ignore[arg-type]
    return found


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def logits_of(proto: onnx.ModelProto) -> np.ndarray:
    w1, w2 = (onnx.numpy_helper.to_array(one).astype(np.float64) for one in proto.graph.initializer)
    return np.asarray(np.tanh(X @ w1) @ w2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_hintons_on_the_logits_behind_softmax(temperature: float) -> None:
    student, teacher = net(1, 5), net(2, 8)
    p, q = (softmax(logits_of(one) / temperature) for one in (teacher, student))
    expected = temperature**2 * (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(
        loss_of(student, teacher, temperature=temperature), expected, rtol=1e-4, atol=1e-5
    )


def test_what_lies_behind_softmax_does_not_hide_it() -> None:
    student, teacher = net(1, 5), net(2, 8)
    teacher.graph.node[-1].output[0] = "p"
    teacher.graph.node.append(onnx.helper.make_node("Identity", ["p"], ["y"]))
    np.testing.assert_allclose(loss_of(student, teacher), loss_of(student, net(2, 8)), rtol=1e-5)


def test_probabilities_and_numbers_have_losses_of_their_own() -> None:
    student, teacher = net(1, 5, "Sigmoid"), net(2, 8, "Sigmoid")
    p, z = 1 / (1 + np.exp(-logits_of(teacher))), logits_of(student)
    expected = (np.logaddexp(0, z) - p * z).mean(-1)
    np.testing.assert_allclose(loss_of(student, teacher), expected, rtol=1e-4)
    student, teacher = net(1, 5, "Identity"), net(2, 8, "Identity")
    expected = np.square(logits_of(student) - logits_of(teacher)).mean(-1)
    np.testing.assert_allclose(loss_of(student, teacher), expected, rtol=1e-4)


def test_of_two_teachers_it_is_the_mean() -> None:
    student, one, other = net(1, 5), net(2, 8), net(3, 7)
    mean = (loss_of(student, one) + loss_of(student, other)) / 2
    np.testing.assert_allclose(loss_of(student, [one, other]), mean, rtol=1e-5)


def test_what_is_kept_is_what_would_be_computed_again_and_bounded() -> None:
    model = net(2, 8)
    kept, fresh, small = Teacher(model, memory=1 << 20), Teacher(model), Teacher(model, memory=40)
    arrays = {"x": torch.from_numpy(X)}
    first = kept(arrays)["y"]
    assert torch.equal(kept({"x": arrays["x"].flip(0)})["y"], first.flip(0))
    alone = torch.cat([fresh({"x": row[None]})["y"] for row in arrays["x"]])
    assert torch.equal(first, alone)
    torch.testing.assert_close(fresh(arrays)["y"], first)
    assert torch.equal(small(arrays)["y"], first)
    assert (len(kept._kept), len(small._kept)) == (64, 2)
    torch.testing.assert_close(Teacher(model, device=torch.device("cpu"))(arrays)["y"], first)


def test_a_teacher_of_a_fixed_batch_size_serves_any() -> None:
    model = net(2, 8)
    free = Teacher(model)({"x": torch.from_numpy(X[:7])})["y"]
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    torch.testing.assert_close(Teacher(model)({"x": torch.from_numpy(X[:7])})["y"], free)


@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_a_teacher_gets_a_state_and_a_scalar_whole(memory: int) -> None:
    proto = text_model(
        "agraph (float[1, 4] x, float[2, 1, 3] h) => (float[1, 4] y, float[2, 1, 3] k) "
        "{ y = Tanh(x) k = Tanh(h) }"
    )
    arrays = {"x": torch.ones(1, 4), "h": torch.arange(6.0).reshape(2, 1, 3)}
    one = Teacher(proto, memory=memory)
    for told in (one(arrays), one(arrays)):
        torch.testing.assert_close(told, {"y": arrays["x"].tanh(), "k": arrays["h"].tanh()})
    proto = text_model("agraph (float[n, 4] x, float s) => (float[n, 4] y) { y = Mul(x, s) }")
    arrays = {"x": torch.arange(8.0).reshape(2, 4), "s": torch.tensor(3.0)}
    torch.testing.assert_close(Teacher(proto, memory=memory)(arrays), {"y": 3 * arrays["x"]})


def test_a_state_that_is_given_on_is_learned_too() -> None:
    text = (
        "agraph (float[1, 4] x, float[2, 1, 3] h) => (float[1, 4] y, float[2, 1, 3] k) "
        "<float[4, 4] w, float[3, 3] v> { y = MatMul(x, w) k = MatMul(h, v) }"
    )
    student, teacher = (filled(text_model(text), seed) for seed in (1, 2))
    rng = np.random.default_rng(0)
    sizes = {"x": (32, 1, 4), "h": (32, 2, 1, 3)}
    data = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    final = distill(student, data, teacher=teacher, epochs=20, lr=0.1, batch_size="8").report.final
    assert final.before < 0.1 * final.before < final.after < 0


def test_hidden_tensors_are_matched_through_a_map_that_leaves_no_trace() -> None:
    student, teacher = net(1, 5), net(2, 8)
    x = np.random.default_rng(1).normal(size=(1024, 6)).astype(np.float32)
    options: dict[str, Any] = {
        "epochs": 3,
        "lr": 0.02,
        "batch_size": 16,
        "holdout": 0.0,
        "match_weight": 20.0,
    }
    plain = distill(student, {"x": x}, teacher=teacher, **options)
    matched = distill(student, {"x": x}, teacher=teacher, match="hid*", **options)

    def fit(model: ir.Model) -> float:
        """What of the teacher's hidden tensor no linear map of the student's gives."""
        mine, theirs = (
            np.tanh(x @ onnx.numpy_helper.to_array(one.graph.initializer[0]))
            for one in (ir.to_proto(model), teacher)
        )
        return float(np.linalg.lstsq(mine, theirs, rcond=None)[1].sum())

    assert fit(matched.graph) < 0.9 * fit(plain.graph)
    written = ir.to_proto(matched.graph)
    assert [node.op_type for node in written.graph.node] == ["MatMul", "Tanh", "MatMul", "Softmax"]
    assert [(one.name, *one.dims) for one in written.graph.initializer] == [("w1", 6, 5), ("w2", 5, 4)]
    assert [one.name for one in written.graph.output] == ["y"]


def test_attention_is_matched_where_channels_differ() -> None:
    def conv(channels: int, seed: int) -> onnx.ModelProto:
        proto = text_model(
            "agraph (float[n, 1, 5, 5] x) => (float[n, 2] y) "
            f"<float[{channels}, 1, 3, 3] w, float[{channels}, 2] v>"
            "{ h = Conv(x, w) p = GlobalAveragePool(h) f = Flatten(p) y = MatMul(f, v) }"
        )
        return filled(proto, seed)

    student, teacher = conv(2, 1), conv(3, 2)
    images = np.random.default_rng(0).normal(size=(4, 1, 5, 5)).astype(np.float32)
    model = load(student)
    one = Distiller(DistillRecipe(teacher=teacher, attend=("h",)), model)
    module = to_torch(model)
    data = dataset({"x": images}, contract_of(model), labels=())
    trainer: Any = SimpleNamespace(module=module, world=World(torch.device("cpu")), data=data)
    one.start(trainer)
    arrays = {"x": torch.from_numpy(images)}
    found = one.loss(trainer, module(arrays), arrays).detach().numpy()
    maps, outputs = [], []
    for proto in (student, teacher):
        shown = onnx.ModelProto.FromString(proto.SerializeToString())
        shown.graph.output.append(onnx.helper.make_tensor_value_info("h", 1, None))
        y, h = execute(shown, {"x": images})
        energy = np.square(h).mean(1).reshape(4, -1)
        maps.append(energy / np.linalg.norm(energy, axis=1, keepdims=True))
        outputs.append(y)
    expected = np.square(outputs[0] - outputs[1]).mean(-1) + np.square(maps[0] - maps[1]).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_without_labels_what_pruning_lost_is_recovered(half: ir.Model) -> None:
    quick: dict[str, Any] = {"batch_size": 16, "schedule": "linear"}
    result = distill(
        half, {"image": IMAGES}, teacher=digits_cnn(), epochs=10, lr=8e-3, test={"image": SEEN}, **quick
    )
    report = result.report
    assert accuracy(half) < 0.6
    assert accuracy(result.graph) > 0.95
    assert (report.ok, report.command, report.final.metric, report.notes) == (True, "distill", "likeness", ())
    assert report.final.before < report.final.after < 0


def test_labels_and_teachers_are_mixed(half: ir.Model) -> None:
    given = {"image": IMAGES[:100], "y": LABELS[:100]}
    result = distill(half, given, teacher=digits_cnn(), labels="y", epochs=12, lr=5e-3, metric="accuracy")
    assert result.report.ok
    assert accuracy(result.graph) > accuracy(half) + 0.2


def test_labels_only_judge_where_the_teachers_have_all_of_the_loss(half: ir.Model) -> None:
    given = {"image": IMAGES[:64], "y": LABELS[:64]}
    same: dict[str, Any] = {"teacher": digits_cnn(), "soft": "kl", "epochs": 1, "max_drop": "1000"}
    judged, alone = distill(half, given, labels="y", mix=1.0, **same), distill(half, given, **same)
    assert (judged.report.final.metric, alone.report.final.metric) == ("accuracy", "likeness")
    assert ir.to_proto(judged.graph).graph.initializer == ir.to_proto(alone.graph).graph.initializer
    assert ir.to_proto(judged.graph).graph.initializer != ir.to_proto(half).graph.initializer


def test_a_result_that_is_worse_is_not_kept() -> None:
    model = net(2, 8)
    result = distill(model, {"x": X}, teacher=model, epochs=1, lr=0.5)
    assert "; max_drop is 0" in result.report.reason
    assert ir.to_proto(result.graph).graph.initializer == model.graph.initializer


def test_noise_is_told_from_images_and_tables() -> None:
    noise = np.random.default_rng(0).normal(size=(128, 1, 8, 8)).astype(np.float32)
    contract = contract_of(load(digits_cnn()))
    assert looks_random(dataset({"image": noise}, contract, labels=()))
    assert not looks_random(dataset({"image": IMAGES}, contract, labels=()))
    assert not looks_random(dataset({"x": X}, contract_of(load(net(1, 5))), labels=()))
    model = digits_cnn()
    result = distill(model, {"image": noise}, teacher=model, epochs=1, max_drop="100")
    assert any("independent random numbers" in note for note in result.report.notes)


_CLASS = text_model("agraph (float[n, 4] x) => (int64[n] k) { k = ArgMax<axis = 1, keepdims = 0>(x) }")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, UsageError, "nobody to learn from"),
        ({"teacher": "nowhere.onnx"}, ModelError, "nowhere.onnx"),
        ({"teacher": net(2, 8), "mix": 1.5}, UsageError, "mix is from 0 to 1"),
        ({"teacher": net(2, 8), "soft": "kll"}, UsageError, "unknown soft loss 'kll'.*kl"),
        ({"teacher": net(2, 8), "match": "hiden=hidden"}, UsageError, "no tensor 'hiden'.*hidden"),
        (
            {"teacher": net(2, 8), "match": "hidden=hiden"},
            UsageError,
            "teacher has no tensor 'hiden'.*hidden",
        ),
        ({"teacher": net(2, 8), "match": "*lost*"}, UsageError, "no tensor that both models have is called"),
        ({"teacher": net(2, 8), "match": "=hidden"}, UsageError, "expected STUDENT=TEACHER"),
        ({"teacher": net(2, 8), "attend": "hidden"}, UsageError, "'hidden' is 1x5, .* 1x8: attention is"),
        ({"teacher": net(2, 8), "outputs": "y=z9"}, UsageError, "no output goes with 'y' among 'y'"),
        ({"teacher": digits_cnn()}, OnnxoptError, "the run on .* failed"),
        ({"teacher": _CLASS}, UsageError, "no output goes with 'y' among none"),
        ({"teacher": net(2, 8), "metric": "accuracy"}, UsageError, "metric accuracy: it needs labels"),
    ],
)
def test_bad_input_is_told_in_one_line(options: dict[str, Any], error: type[OnnxoptError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        distill(net(1, 5), {"x": X}, epochs=1, **options)
    assert "\n" not in str(caught.value)


def test_inputs_of_other_names_are_given_by_a_map() -> None:
    teacher = net(2, 8)
    for node in teacher.graph.node:
        node.input[:] = ["u" if name == "x" else name for name in node.input]
    teacher.graph.input[0].name = "u"
    expected = loss_of(net(1, 5), net(2, 8))
    np.testing.assert_array_equal(loss_of(net(1, 5), teacher), expected)
    np.testing.assert_array_equal(loss_of(net(1, 5), teacher, inputs=("x=u",)), expected)


def test_from_the_command_line(
    half: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(digits_cnn(), "large.onnx")
    onnxopt.save(half, "small.onnx")
    np.savez("in.npz", image=IMAGES)
    Path("how.toml").write_text('teacher = "large.onnx"\nepochs = 2\nlr = 0.003\n')
    common = ["train", "distill", "small.onnx", "-o", "out.onnx", "--data", "in.npz", "--json", "report.json"]
    with pytest.raises(SystemExit) as done:
        main([*common, "--recipe", "how.toml", "--match", "image"])
    assert done.value.code == 2
    with pytest.raises(SystemExit) as done:
        main([*common, "--recipe", "how.toml", "--temperature", "2", "--teacher", "large.onnx"])
    assert done.value.code == 0
    report = json.loads(Path("report.json").read_text())
    assert (report["command"], report["recipe"]["teacher"]) == ("distill", ["large.onnx"])
    assert load("out.onnx").metadata_props["onnxopt.passes"].endswith(",distill")
    with pytest.raises(SystemExit) as done:
        main(common)
    assert done.value.code == 2
    assert "give --teacher" in capsys.readouterr().err
