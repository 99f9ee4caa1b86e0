"""From a file to a file: accuracy in ONNX Runtime rises, kill -9 and two processes change nothing, errors."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from models.digits_cnn import digits
from onnxopt.cli import main
from onnxopt.data import synthesize
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array
from onnxopt.model import load
from onnxopt.training import Recipe, finetune, prune, train_qat
from onnxopt.training.normalization import fold_batchnorm, with_batchnorm
from tests.support import assert_equivalent, execute, text_model
from tests.training.support import TOGETHER, Pair, Training, write_digits

QUICK: dict[str, Any] = {"labels": "y", "epochs": 2, "lr": 3e-3, "batch_size": 64}


@pytest.fixture(name="place")
def digits_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path)
    return tmp_path


def test_digits_that_the_model_does_not_know_are_learned(place: Path) -> None:
    before = onnx.load("model.onnx")
    said: list[str] = []
    options = {**QUICK, "epochs": 6, "test": "test.npz"}
    result = finetune("model.onnx", "train.npz", progress=lambda what, _: said.append(what), **options)
    report = result.report
    assert report.final.before < 0.4
    assert report.final.after > report.final.before + 0.4
    assert (report.final.unseen, report.choice.unseen, report.choice.metric) == (True, False, "accuracy")
    assert (report.samples, report.steps, report.ok) == ((461, 51, 500), 48, True)
    images, labels = (np.load("test.npz")[name] for name in ("image", "y"))
    after = ir.to_proto(result.graph)
    (logits,) = execute(after, {"image": images})
    assert report.final.after == pytest.approx((logits.argmax(1) == labels).mean())
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    names = [[tensor.name for tensor in one.graph.initializer] for one in (before, after)]
    assert sorted(names[0]) == sorted(names[1])
    assert any(what.startswith("epoch 6/6 loss") for what in said)
    shown = json.loads(json.dumps(report.to_dict()))
    assert shown["schema"] == "onnxopt.train/1"
    assert len(shown["curves"]["loss"]) == len(shown["curves"]["score"]) == 6
    assert shown["recipe"]["epochs"] == 6


def test_the_same_seed_gives_the_same_bytes_and_the_models_stay_as_they_were(place: Path) -> None:
    model = onnx.load("model.onnx")
    bytes_before = model.SerializeToString()
    data = dict(np.load("train.npz"))

    def trained(seed: int) -> bytes:
        result = finetune(model, data, **QUICK, seed=seed, transforms=("noise",), steps=3, max_drop=1)
        assert isinstance(result.model, onnx.ModelProto)
        return bytes(result.model.SerializeToString(deterministic=True))

    assert trained(1) == trained(1) != trained(2)
    assert model.SerializeToString() == bytes_before


def test_a_final_softmax_is_looked_through(place: Path) -> None:
    def proto(tail: str, output: str) -> onnx.ModelProto:
        return text_model(
            f"agraph (float[n, 4] x) => (float[n, 3] {output}) "
            f"<float[4, 3] w = {{1,2,3,4,5,6,7,8,9,10,11,12}}> {{ {tail} }}"
        )

    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    data = {"x": x, "y": x[:, :3].argmax(1)}
    plain = finetune(proto("y0 = MatMul(x, w)", "y0"), data, **QUICK, metric="loss", holdout=0)
    soft = finetune(proto("a = MatMul(x, w) y0 = Softmax(a)", "y0"), data, **QUICK, metric="loss", holdout=0)
    values = [one.graph.graph.initializers["w"] for one in (plain, soft)]
    np.testing.assert_array_equal(constant_array(values[0]), constant_array(values[1]))
    assert plain.report.final.after == pytest.approx(soft.report.final.after, rel=1e-5)
    assert plain.report.final.metric == "-loss"  # more is better
    assert plain.report.final.before < plain.report.final.after < 0
    assert "the metric was measured on the samples that were trained on" in plain.report.notes[0]


@pytest.mark.parametrize("metric", ["accuracy", "agreement"])
def test_what_gives_nan_scores_nothing(place: Path, metric: str) -> None:
    """A rate so high that a single step leaves no number: NaN is the largest for argmax, and no class."""
    data = {"image": np.load("train.npz")["image"], "y": np.zeros(512, np.int64)}
    options = {**QUICK, "epochs": 1, "batch_size": "full", "lr": np.inf, "holdout": 0, "max_drop": "1"}
    report = finetune("model.onnx", data, metric=metric, **options).report
    assert (report.steps, report.final.after) == (1, 0)


def test_a_fixed_batch_and_metrics_of_other_names(place: Path) -> None:
    proto = onnx.load("model.onnx")
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    Path("metric.py").write_text("def ones(run):\n    return float(len(run(feed)))\n" + _FEED)
    for metric in ("agreement", "metric.py:ones", "accuracy"):
        options = {**QUICK, "epochs": 1, "metric": metric, "max_drop": 1}
        report = finetune(proto if metric == "accuracy" else "model.onnx", "train.npz", **options).report
        assert report.final.metric == metric
    assert report.final.after > report.final.before


_FEED = "import numpy as np\nfeed = {'image': np.zeros((1, 1, 8, 8), np.float32)}\n"


def test_batchnorm_is_put_in_as_identity_and_folded_back_under_the_old_names() -> None:
    proto = text_model(
        "agraph (float[n, 2, 6, 6] x) => (float[n, 4, 6, 6] y) "
        "<float[3, 2, 1, 1] w1 = {1,2,3,4,5,6}, float[3] b1 = {1,2,3}, float[4, 3, 1, 1] w2 = "
        "{1,2,3,4,5,6,7,8,9,1,2,3}> { a = Conv(x, w1, b1) c = Relu(a) d = Conv(c, w2) y = Relu(d) }"
    )
    model, samples = load(proto), synthesize(proto, seed=0, shapes={"x": (4, 2, 6, 6)})
    inner, sites = with_batchnorm(model, samples)
    assert [node.op_type for node in inner.graph].count("BatchNormalization") == len(sites) == 2
    assert_equivalent(proto, ir.to_proto(inner), kind="reorder")
    for name in ("a_bn_scale", "d_bn_var"):
        value = inner.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=name)
    changed = ir.to_proto(inner)
    fold_batchnorm(inner, sites)
    assert_equivalent(changed, ir.to_proto(inner), kind="reorder")
    assert [node.op_type for node in inner.graph] == [node.op_type for node in model.graph]
    assert list(inner.graph.initializers) == [*model.graph.initializers, "d_bias"]
    with pytest.raises(UsageError, match="batchnorm: statistics are taken from samples"):
        with_batchnorm(model, [])


def test_training_with_batchnorm_gives_the_graph_without(place: Path) -> None:
    plain = ir.to_proto(with_batchnorm(load("model.onnx"), [])[0])
    assert [n.op_type for n in plain.graph.node].count("BatchNormalization") == 3  # all have one already
    text = (
        "agraph (float[n, 1, 8, 8] image) => (float[n, 10] y) <float[8, 1, 3, 3] c = {}, float[8] d = {},"
        "float[10, 288] f = {}> { a = Conv(image, c, d) b = Relu(a) e = Flatten(b) y = Gemm<transB=1>(e, f) }"
    )
    proto = text_model(text)
    for tensor, shape in zip(proto.graph.initializer, ((8, 1, 3, 3), (8,), (10, 288)), strict=True):
        array = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    options = {**QUICK, "epochs": 4, "lr": 0.01, "loss": "cross-entropy=y"}
    result = finetune(proto, "train.npz", **options, batchnorm=True)
    assert [node.op_type for node in result.graph.graph] == ["Conv", "Relu", "Flatten", "Gemm"]
    assert list(result.graph.graph.initializers) == ["c", "d", "f"]
    assert result.report.final.after > result.report.final.before


_KILLED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("finetune", {"labels": "y"}),
    "a stream, augmented, averaged, evaluated in the epoch": (
        "finetune",
        {
            "labels": "y",
            "data": "stream.py:digits",
            "validation": "train.npz",
            "shuffle": 50,
            "steps": 16,
            "evaluate": 3,
            "optimizer": "sgd{momentum=0.9,nesterov=true}",
            "ema": 0.9,
            "transforms": "noise{std=0.1}",
            "schedule": "cosine",
        },
    ),
    "qat": ("qat", {"labels": "y", "weights": "int4", "optimizer": "adam"}),
    "masks": ("prune", {"labels": "y", "sparsity": 0.8, "ramp": "cubic", "score": "taylor", "rewind": 2}),
}


@pytest.mark.parametrize("kind", _KILLED)
def test_kill_9_and_resume_give_the_bytes_of_an_uninterrupted_run(kind: str, place: Path) -> None:
    training, options = _KILLED[kind]
    Path("stream.py").write_text(_STREAM)
    killed = Training(place, "out.onnx", training, options)
    function = {"finetune": finetune, "qat": train_qat, "prune": prune}[training]
    given = {**TOGETHER, "data": "train.npz", "devices": "cpu", **options}
    whole = function("model.onnx", **given, folder="whole")
    whole.save("whole.onnx")
    killed.wait_for(3 + zlib.crc32(kind.encode()) % 9)  # somewhere
    killed.kill()
    assert not Path("out.onnx").exists()
    rows = killed.log.read_bytes().count(b"\n")
    rest = function("model.onnx", **given, folder="out.onnx.train", resume=True)
    rest.save("out.onnx")
    assert Path("out.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert killed.log.read_bytes() == Path("whole/log.jsonl").read_bytes()
    assert rows < killed.log.read_bytes().count(b"\n")
    assert rest.report.curves == whole.report.curves


_STREAM = """
import numpy as np
def digits():
    data = np.load("train.npz")
    for i in range(0, 512, 100):
        yield {name: data[name][i:i + 100] for name in ("image", "y")}
"""


def test_two_processes_are_one_on_the_union_of_their_batches(place: Path) -> None:
    pair = Pair(place, "out.onnx", "finetune", {"json": "r.json"})
    alone = finetune("model.onnx", "train.npz", **QUICK, interval=2, devices="cpu")
    assert pair.told() == ["", ""]
    report = json.loads(Path("r.json").read_text())
    assert report["process"] == [0, 2]
    np.testing.assert_allclose(report["curves"]["loss"], alone.report.curves["loss"], rtol=1e-4)
    for tensor in onnx.load("out.onnx").graph.initializer:
        wanted = constant_array(alone.graph.graph.initializers[tensor.name])
        assert wanted is not None
        np.testing.assert_allclose(onnx.numpy_helper.to_array(tensor), wanted, atol=2e-4)


Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="run")
def command(capsys: pytest.CaptureFixture[str], place: Path) -> Ran:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", "finetune", *arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_the_command_writes_prints_and_reports(run: Ran) -> None:
    Path("r.toml").write_text('data = "train.npz"\nlabels = ["y"]\nlr = 0.003\nepochs = 9\n')
    given = "model.onnx -o o.onnx --recipe r.toml --epochs 1 --json r.json"
    code, out, err = run(*given.split(" "))
    assert (code, err) == (0, "")
    for part in ("accuracy", "best", "written o.onnx", "15 steps in", "give others with test="):
        assert part in " ".join(out.split())
    report = json.loads(Path("r.json").read_text())
    assert (report["recipe"]["epochs"], report["recipe"]["lr"], report["ok"]) == (1, 0.003, True)
    onnx.checker.check_model(onnx.load("o.onnx"))
    assert sorted(path.name for path in Path("o.onnx.train").iterdir()) == [
        "best.onnx",
        "checkpoint.pt",
        "last.onnx",
        "log.jsonl",
    ]


def test_what_got_worse_is_not_written_unless_asked_for(run: Ran) -> None:
    images, labels = digits(256, 5)
    np.savez("known.npz", image=images, y=(labels + 1) % 10)
    np.savez("true.npz", image=images, y=labels)
    given = ("model.onnx", "-o", "o.onnx", "--data", "known.npz", "--labels", "y", "--test", "true.npz")
    code, out, _ = run(*given, "--lr", "0.01", "--epochs", "2")
    assert code == 1
    assert "nothing was written: accuracy" in out
    assert not Path("o.onnx").exists()
    code, out, _ = run(*given, "--lr", "0.01", "--epochs", "2", "--max-drop", "1")
    assert (code, Path("o.onnx").exists()) == (0, True)


_READ = ("model.onnx", "train.npz", "test.npz")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("", 2, "say where to write: -o OUT"),
        ("-o o.onnx", 2, "train: there is nothing to train on: give --data"),
        (
            "-o o.onnx --data train.npz",
            2,
            "loss: 0 possible labels (none): labels=NAME says which",
        ),
        ("-o o.onnx --data train.npz --labels z", 2, "no array for label 'z' (known: image, y)"),
        ("-o o.onnx --data train.npz --labels y --loss cros-entropy", 2, "did you mean 'cross-entropy'?"),
        ("-o o.onnx --data train.npz --labels y --metric acuracy", 2, "unknown metric 'acuracy'"),
        ("-o o.onnx --data train.npz --labels y --epoch 3", 2, "No such option"),
        ("-o o.onnx --data train.npz --labels y --loss mse", 2, "loss mse: the label is"),
        (
            "-o o.onnx --data train.npz --labels y --devices cuda:7",
            2,
            "devices 'cuda:7': cannot be used",
        ),
        ("-o o.onnx --data train.npz --labels y --init fc=he", 2, "init: no parameter is called 'fc'"),
        ("-o o.onnx --data train.npz --labels y --lr 1e20", 1, "take a lower lr, or clip_norm"),
        ("-o o.onnx --data nowhere --labels y", 2, "no such file or folder"),
        ("-o model.onnx --data train.npz --labels y", 2, "the training reads this file: give another one"),
        ("-o train.npz --data train.npz --labels y", 2, "the training reads this file: give another one"),
        ("-o o.onnx --data more.npz --labels y", 2, "'y': 51 from 7 to 16; expected 51 of the 10 classes"),
        ("-o o.onnx --data more.npz --labels single", 2, "(class indices are integers): the label is 51"),
        ("-o o.onnx --data more.npz --labels text", 2, "label 'text' is of type <U2; expected numbers"),
        (
            "-o o.onnx --data more.npz --labels y --loss ctc",
            2,
            "it takes outputs of samples, time and classes",
        ),
        ("-o o.onnx --data none.npz --labels y", 2, "none.npz holds no samples"),
        ("-o o.onnx --data one.npz --labels y", 2, "holdout 0.1: of 1 samples some have to be left"),
        ("-o o.onnx --data train.npz --labels y --max-drop x", 2, "--max-drop 'x': expected a drop such as"),
        (
            "-o o.onnx --data train.npz --labels y --transforms shift{by=-1}",
            2,
            "fails on 1 x 8 x 8: high <= 0",
        ),
        ("-o o.onnx --data train.npz --labels y --transforms normalize{std=0}", 2, "normalize: std is 0"),
        ("-o o.onnx --data train.npz --labels y --transforms mixup{alpha=0}", 2, "alpha is 0, not above 0"),
        ("-o o.onnx --data train.npz --labels y --groups weights{lr=-1}", 2, "lr and weight_decay are at le"),
        ("-o o.onnx --data train.npz --labels y --schedule wave", 2, "unknown schedule 'wave' (known: cons"),
        ("-o o.onnx --data train.npz --labels y --optimizer lion", 2, "unknown optimizer 'lion' (known: ad"),
        ("-o o.onnx --data train.npz --labels y --shard", 2, "shard: it takes several processes"),
        ("-o o.onnx --data train.npz --labels y --freeze *", 2, "nothing is left to train"),
    ],
)
def test_bad_input_is_told_in_one_line(run: Ran, arguments: str, code: int, told: str) -> None:
    data, before = dict(np.load("train.npz")), {name: Path(name).read_bytes() for name in _READ}
    labels = {"y": data["y"] + 7, "single": data["y"].astype(np.float32), "text": data["y"].astype("U2")}
    np.savez("more.npz", image=data["image"], **labels)
    for name, count in {"none": 0, "one": 1}.items():
        np.savez(f"{name}.npz", image=data["image"][:count], y=data["y"][:count])
    found, out, err = run("model.onnx", *arguments.split())
    assert (found, out) == (code, "")
    assert before == {name: Path(name).read_bytes() for name in _READ}
    assert told in err
    assert err.count("\n") == 1
    assert not Path("o.onnx").exists()


def test_python_is_told_the_same(place: Path) -> None:
    with pytest.raises(UsageError, match="resume: give the folder"):
        finetune("model.onnx", "train.npz", labels="y", resume=True)
    with pytest.raises(UsageError, match=r"unknown option 'batchsize' \(did you mean 'batch_size'\?\)"):
        finetune("model.onnx", "train.npz", labels="y", batchsize=3)
    recipe = Recipe(labels=("y",), epochs=1, steps=1)
    assert finetune("model.onnx", "train.npz", recipe=recipe, max_drop=1).report.steps == 1
