"""What users bring: graphs as exporters leave them, and inputs that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from onnxopt.cli.main import main
from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array
from onnxopt.model import ModelLike, load
from onnxopt.runtimes import open_session
from onnxopt.training import distill, finetune, to_torch, train_qat, write_back
from onnxopt.training.loop.batching import takes_batches
from onnxopt.training.loop.checkpoints import read_checkpoint
from onnxopt.training.loop.losses import parse_loss
from onnxopt.training.samples.dataset import Dataset
from onnxopt.training.samples.sources import open_source
from onnxopt.training.schedules import parse_schedule
from onnxopt.training.teachers import Teacher
from tests.support import text_model
from tests.training.nets import build
from tests.training.support import trainer

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Of each test, whichever ran before."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def fed(model: ModelLike, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    with open_session(model, level="none") as session:
        return session.run(feeds)


def gradient(module: nn.Module) -> list[list[float]]:
    found: list[list[float]] = dict(module.named_parameters())["w"].grad.tolist()  # type: ignore[union-attr]
    return found


def test_random_operators_draw_by_the_seed_of_torch() -> None:
    module = to_torch(
        build(
            """g (float[N] x) => (float[N] n, float[N] u, float[2, 500] v, float[N] b) {
            n = RandomNormalLike<mean = 2.0, scale = 3.0>(x)
            u = RandomUniformLike<low = -1.0, high = 3.0>(x)
            v = RandomNormal<shape = [2, 500], seed = 1.0>()
            c = ConstantOfShape<value = float[1] {0.5}>(size)
            b = Bernoulli(c)
        }""",
            {"size": np.array([4000])},
        )
    )
    feeds = {"x": torch.zeros(4000)}
    torch.manual_seed(1)
    found = module(feeds)
    assert (float(found["n"].mean()), float(found["n"].std())) == pytest.approx((2, 3), abs=0.15)
    assert (float(found["u"].min()), float(found["u"].max())) == pytest.approx((-1, 3), abs=0.01)
    assert tuple(found["v"].shape) == (2, 500)
    assert float(found["v"].std()) == pytest.approx(1, abs=0.1)
    assert float(found["b"].mean()) == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(module(feeds)["n"], found["n"])
    torch.manual_seed(1)
    assert torch.equal(module(feeds)["n"], found["n"])


def test_noise_behind_weights_lets_gradients_through() -> None:
    """As of a variational autoencoder."""
    module = to_torch(
        build(
            """g (float[N, 3] x) => (float[N, 2] y) {
            m = MatMul(x, w)
            r = RandomNormalLike<scale = 0.0>(m)
            y = Add(m, r)
        }""",
            {"w": random(3, 2)},
        )
    )
    module(x=torch.ones(4, 3))["y"].sum().backward()
    assert gradient(module) == [[4, 4]] * 3


def test_the_runtime_computes_texts_and_what_reads_no_input() -> None:
    scaled = "<ir_version: 9, opset_import: ['' : 19, 'ai.onnx.ml' : 3]>".replace("'", '"')
    model = text_model(f"""{scaled} g (string[N] t, float[1, 2] x) => (bool[N] e, float[1, 2] y) {{
        a = Constant<value_strings = ["a"]>()
        e = Equal(t, a)
        c = Constant<value_floats = [3.0, 4.0]>()
        s = ai.onnx.ml.Scaler<offset = [1.0, 1.0], scale = [2.0, 2.0]>(c)
        y = Mul(x, s)
    }}""")
    found = to_torch(model)({"t": np.array(["b", "a"], object), "x": torch.ones(1, 2)})
    assert (found["e"].tolist(), found["y"].tolist()) == ([False, True], [[4, 6]])
    alone = text_model(f"""{scaled} g (float[1, 2] x) => (float[1, 2] y) {{
        c = Constant<value_floats = [3.0, 4.0]>()
        s = ai.onnx.ml.Scaler<offset = [1.0, 1.0], scale = [2.0, 2.0]>(c)
        y = Mul(x, s)
    }}""")
    assert to_torch(alone)(x=torch.ones(1, 2))["y"].tolist() == [[4, 6]]


def test_the_magnitude_of_silence_has_no_gradient() -> None:
    module = to_torch(
        build(
            "g (float[N, 2] x) => (float[N, 2] y) { a = Mul(x, w) s = Mul(a, a) y = Sqrt(s) }",
            {"w": np.ones((1, 2), np.float32)},
        )
    )
    x = torch.tensor([[0.0, -3.0]])
    found = module(x=x)["y"]
    found.sum().backward()
    assert (found.tolist(), gradient(module)) == ([[0, 3]], [[0, 3]])
    roots = to_torch(text_model("agraph (float[N] x) => (float[N] y) { y = Sqrt(x) }"))
    assert torch.equal(roots(x=torch.tensor([-1.0, 0, 4]))["y"].nan_to_num(9), torch.tensor([9.0, 0, 2]))


def test_bodies_in_bodies_read_numbers_of_the_host_more_than_once() -> None:
    """As an EmbeddingBag that torch exports: a Loop over rows, with If in it."""
    model = text_model(
        """agraph (float[N, 2] x) => (float y) {
        s = Shape<end = 1>(x)
        two = Constant<value_ints = [2]>()
        n = Squeeze(s)
        t = Constant<value = bool {1}>()
        zero = Constant<value = float {0.0}>()
        y = Loop(n, t, zero) <body = b (int64 i, bool go, float sum) => (bool on, float next) {
            big = Greater(s, two)
            twice = Mul(s, s)
            f = Cast<to = 1>(i)
            bigger = Squeeze(big)
            part = If(bigger) <
                then_branch = p () => (float q) {
                    b = Less(s, twice)
                    c = Cast<to = 1>(b)
                    e = Squeeze(c)
                    q = Mul(f, e)
                },
                else_branch = m () => (float r) { r = Neg(f) }
            >
            next = Add(sum, part)
            on = Identity(go)
        }>
    }"""
    )
    module = to_torch(model)
    for rows in (2, 4):
        x = random(rows, 2)
        assert float(module(x=x)["y"]) == float(fed(model, {"x": x})["y"])


def test_weights_of_16_bits_are_held_in_32() -> None:
    w = random(4, 3).astype(np.float16)
    model = build(
        """g (float[N, 4] x) => (float[N, 3] y) {
        h = Cast<to = 10>(x)
        m = MatMul(h, w)
        y = Cast<to = 1>(m)
    }""",
        {"w": w},
    )
    module = to_torch(model)
    assert next(module.parameters()).dtype == torch.float32
    same = constant_array(write_back(module, model).graph.initializers["w"])
    assert same is not None
    assert (str(same.dtype), same.tobytes()) == ("float16", w.tobytes())
    with torch.no_grad():
        next(module.parameters()).add_(1e-3)
    trained = write_back(module, model)
    x = random(5, 4)
    np.testing.assert_allclose(module(x=x)["y"].detach(), fed(trained, {"x": x})["y"], rtol=2e-3, atol=2e-3)
    data = {"x": random(64, 4)}
    data["t"] = data["x"] @ random(4, 3)
    report = finetune(model, data, labels="t", loss="mse", epochs=8, lr=0.03).report
    assert report.curves["loss"][-1] < 0.7 * report.curves["loss"][0]


def test_a_stage_that_holds_weights_of_16_bits_rounds_them_too() -> None:
    model = build(
        "g (float16[N, 4] x) => (float16[N, 3] y) { h = Relu(x) y = MatMul(h, w) }",
        {"w": random(4, 3).astype(np.float16)},
    )
    module, x = to_torch(model), torch.from_numpy(random(5, 4)).half()
    expected = module(x=x)["y"]
    module.split([torch.device("cpu")] * 2, {"x": x})
    ((slot, owner, name),) = module.states
    (stage,) = module.readers(slot)
    stage.register_parameter("own", owner._parameters[name])
    stage.held[slot], stage.halves = "own", module.halves
    assert torch.equal(module(x=x)["y"], expected)


ONE = """g (float[1, 2, 3] x) => (float[1, 2] y) {
    f = Reshape(x, shape)
    y = MatMul(f, w)
}"""


@pytest.mark.parametrize(("rows", "together"), [(1, False), (-1, True), (0, True)])
def test_a_graph_made_for_one_sample_gets_one_at_a_time(rows: int, together: bool) -> None:
    w, x = random(6, 2), random(40, 2, 3)
    data = {"x": x, "t": x.reshape(40, 6) @ w}
    model = build(ONE, {"shape": np.array([rows, 6]), "w": np.zeros_like(w)})
    seen = Dataset(open_source(data, labels=["t"]), contract_of(load(model)), ("t",))
    assert takes_batches(to_torch(model), seen) == together
    report = finetune(model, data, labels="t", loss="mse", epochs=40, lr=0.05).report
    assert report.ok
    assert report.final.after > 0.1 * report.final.before
    # in pieces or not, a step is of the same gradient
    whole = build(ONE, {"shape": np.array([-1, 6]), "w": np.zeros_like(w)})
    other = finetune(whole, data, labels="t", loss="mse", epochs=40, lr=0.05).report
    np.testing.assert_allclose(report.curves["loss"], other.curves["loss"], rtol=1e-4)


def test_batches_of_a_stream_are_taken_apart_for_a_graph_made_for_one_sample() -> None:
    w, x = random(6, 2), random(8, 2, 3)
    model = build(ONE, {"shape": np.array([1, 6]), "w": np.zeros_like(w)})
    batches = [({"x": part}, part.reshape(4, 6) @ w) for part in (x[:4], x[4:])]
    curves = [
        finetune(
            model, data, labels="t", loss="mse", steps=6, epochs=3, batch_size=4, validation=whole, workers=0
        ).report.curves["loss"]
        for whole in [{"x": x, "t": x.reshape(8, 6) @ w}]
        for data in (batches, whole)
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=0.2)  # in another order
    assert curves[0][-1] < curves[0][0]


def test_feeds_are_of_as_many_samples_as_the_model_takes() -> None:
    model = build("g (float[4, 3] x) => (float[4, 2] y) { y = MatMul(x, w) }", {"w": random(3, 2)})
    x = random(10, 3)
    samples = Dataset(open_source({"x": x}, labels=[]), contract_of(load(model)), ()).samples()
    assert len(samples) == 3
    np.testing.assert_array_equal(samples[2]["x"], x[[8, 9, 0, 1]])
    assert train_qat(model, {"x": x}, holdout=0.0, epochs=1).report.steps == 1


def test_a_graph_that_mixes_samples_gets_one_at_a_time() -> None:
    model = build(
        "g (float[1, 4, 3] x) => (float[1, 4, 3] y) { m = ReduceMean<keepdims = 1>(x) y = Mul(x, m) }", {}
    )
    seen = Dataset(open_source({"x": random(4, 4, 3)}, labels=[]), contract_of(load(model)), ())
    assert not takes_batches(to_torch(model), seen)


@pytest.mark.parametrize(("first", "size"), [("1", 1), ("1", 4), ("N", 1)])
def test_samples_of_different_lengths(first: str, size: int, tmp_path: Path) -> None:
    model = build(
        f"g (float[{first}, L, 8] x) => (float[{first}, L, 8] y) {{ y = MatMul(x, w) }}", {"w": random(8, 8)}
    )
    for number in range(10):
        np.savez(tmp_path / f"{number}.npz", x=random(1, 2 + number % 4, 8))
    report = train_qat(model, tmp_path, weights="int4", batch_size=size, epochs=2).report
    assert report.steps == 2 * -(-9 // size)
    assert report.final.after < report.final.before


def test_a_teacher_may_give_more_rows_than_there_are_samples() -> None:
    """As a tagger of one text, whose rows are places."""
    model = build(
        "g (float[1, L] x) => (float[L, 2] y) { f = Reshape(x, column) y = MatMul(f, w) }",
        {"column": np.array([-1, 1]), "w": random(1, 2)},
    )
    x = random(3, 5)
    found = Teacher(model)({"x": torch.from_numpy(x)})["y"]
    np.testing.assert_allclose(found, to_torch(model)(x=x)["y"].detach(), rtol=1e-5)
    assert distill(model, {"x": random(12, 5)}, teacher=model, epochs=1, max_drop="1").report.steps == 1


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ([[1, 2, 1, 2, 1]], r"a label of 5 classes takes 5 steps in time, the output has 4"),
        ([[1, 1, 1, -1]], r"a label of 3 classes takes 5 steps"),
        ([[1, 3, -1]], r"classes from 0 to 2 but the blank, 0, and -1 after .* found -1 to 3"),
        ([[1, 0, 2]], "but the blank"),
        ([[1, -1, 2]], "-1 after the last one"),
        ([[1.0, 2.0]], "rows of integers"),
        ([1], "rows of integers"),
    ],
)
def test_ctc_refuses_labels_that_no_alignment_gives(target: Any, said: str) -> None:
    objective = parse_loss("ctc").bound(["y"], ["t"], ["t"])
    with pytest.raises(UsageError, match=said):
        objective({"y": torch.zeros(1, 4, 3)}, {"t": torch.tensor(target)})
    fine = {"t": torch.tensor([[1, 1, -1, -1]])}
    assert float(objective({"y": torch.zeros(1, 4, 3)}, fine)) > 0


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda _y, arrays: arrays["key"], "loss: the function failed: KeyError: 'key'"),
        (lambda _y, _a: None, "loss: the function gives a NoneType; expected a tensor"),
        (lambda _y, _a: np.float32(1), "loss: the function gives a float32; expected a tensor"),
        (lambda _y, _a: torch.ones(()), "train: the loss depends on nothing that is trained"),
    ],
)
def test_a_loss_of_the_user_that_cannot_be_used_is_told(loss: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        trainer(loss=loss).fit()


@pytest.mark.parametrize("spec", ["exponential{gamma=-1}", "inverse-sqrt{delta=-1}", "plateau{patience=-1}"])
def test_a_schedule_does_not_go_below_zero(spec: str) -> None:
    with pytest.raises(UsageError, match="an option is less than 0"):
        parse_schedule(spec)


def matrix(classes: int) -> onnx.ModelProto:
    return build("g (float[N, 4] x) => (float[N, C] y) { y = MatMul(x, w) }", {"w": random(4, classes)})


def wide() -> onnx.ModelProto:
    return build("g (float[N, 7] x) => (float[N, 3] y) { y = MatMul(x, w) }", {"w": random(7, 3)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher": matrix(5)}, r"'y' is of shape \(.*3\), a teacher's 'y' of \(.*5\): give one"),
        ({"teacher": wide()}, "the teacher does not take these inputs: .*the run on"),
        ({"teacher": matrix(3), "outputs": "z=y"}, "outputs: there is no 'z'"),
        ({"teacher": matrix(3), "inputs": "x=z"}, "inputs: there is no 'z'"),
        ({"teacher": matrix(3), "temperature": float("nan")}, "temperature, match_weight and cache are at"),
    ],
)
def test_teachers_that_do_not_fit_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        distill(matrix(3), {"x": random(20, 4)}, epochs=1, **options)


def test_spreadsheets_end_in_empty_lines_and_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,a,b\n1,2,3\n\n4,5,6\n\n", encoding="utf-8-sig")
    found = open_source(str(tmp_path / "a.csv"), labels=["y"])
    assert {name: one.tolist() for name, one in found.rows(np.arange(2)).items()} == {  # type: ignore[union-attr]
        "": [[2, 3], [5, 6]],
        "y": [1, 4],
    }


@pytest.mark.parametrize(
    ("text", "said"), [("a,y\n1,2\n3\n", "1 fields in '3', 2 in the first line"), ("", "holds no samples")]
)
def test_spreadsheets_that_cannot_be_read_are_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UsageError, match=said):
        open_source(str(tmp_path / "a.csv"), labels=[])


def test_a_checkpoint_of_other_things_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="of another model or recipe"):
        read_checkpoint(tmp_path / "checkpoint.pt", "this")


def test_data_that_cannot_be_judged_or_read_is_told(tmp_path: Path) -> None:
    x, y = random(20, 4), np.arange(20) % 3
    given: dict[str, Any] = {"labels": "y", "epochs": 1}
    with pytest.raises(UsageError, match="metric accuracy: it gives NaN"):
        finetune(matrix(3), {"x": x, "y": y}, validation={"x": x * np.nan, "y": y}, **given)
    with pytest.raises(UsageError, match="'NoneType' object is not iterable"):
        finetune(matrix(3), lambda: None, validation={"x": x, "y": y}, steps=1, **given)
    for number in range(8):
        labels: dict[str, Any] = {} if number == 3 else {"y": y[:1]}
        np.savez(tmp_path / f"{number}.npz", x=x[:1], **labels)
    with pytest.raises(UsageError, match="there is a sample without the array 'y'"):
        finetune(matrix(3), tmp_path, **given)
    number = text_model("agraph (float[N, 4] x) => (int64[N] y) { y = ArgMax<axis = 1, keepdims = 0>(x) }")
    with pytest.raises(UsageError, match="the model has no float output to learn with: cut"):
        finetune(number, {"x": x, "y": y}, **given)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments])
    return int(ended.value.code or 0)


def test_a_report_is_not_written_over_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(matrix(3), "m.onnx")
    onnx.save(matrix(3), "t.onnx")
    np.savez("d.npz", x=random(20, 4))
    onnx.save(matrix(3), "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    files = ("d.npz", "t.onnx", "m.onnx", "e.data")
    before: Sequence[bytes] = [Path(name).read_bytes() for name in files]
    for taken in (*files, "o.onnx"):
        given = ["distill", "m.onnx", "-o", "o.onnx", "--data", "d.npz", "--teacher", "t.onnx"]
        assert command(*given, "--json", taken) == 2
        assert f"--json {taken}: this is no report, but a file of something else" in capsys.readouterr().err
        assert before == [Path(name).read_bytes() for name in files]
    for one in (["e.onnx", "--teacher", "t.onnx"], ["m.onnx", "--teacher", "e.onnx"]):
        assert command("distill", *one, "--data", "d.npz", "-o", "e.data", "--epochs", "1") == 2
        assert "-o e.data: the training reads this file" in capsys.readouterr().err
    assert before == [Path(name).read_bytes() for name in files]
    for _ in range(2):
        assert command(*given, "--epochs", "2", "--json", "r.json") in (0, 1)
    assert json.loads(Path("r.json").read_text())["command"] == "distill"
