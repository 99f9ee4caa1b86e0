"""Pruning with training: masks hold in the written file, ramps, rewinding, and what is left is recovered."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="training needs torch")

from models.digits_cnn import digits, digits_cnn
from onnxopt.cli import main
from onnxopt.data.contract import contract_of
from onnxopt.errors import UsageError
from onnxopt.model import load
from onnxopt.pruning.weights import kept_elements, sparsity
from onnxopt.training import PruneRecipe, prune, to_torch
from onnxopt.training.loop.losses import parse_loss
from onnxopt.training.loop.parallel import World
from onnxopt.training.loop.trainer import Trainer
from onnxopt.training.masks import Masks, ramp
from tests.support import execute, text_model
from tests.training.support import LossJudge, dataset, whole_and_resumed

IMAGES, LABELS = digits(256, 1)
SEEN, TRUTH = digits(400, 2)
DATA = {"image": IMAGES, "y": LABELS}


def zeros(model: ir.Model) -> float:
    layers = sparsity(model)
    return sum(one.zeros for one in layers) / sum(one.elements for one in layers)


def accuracy(proto: onnx.ModelProto) -> float:
    (logits,) = execute(proto, {"image": SEEN})
    return float((logits.argmax(1) == TRUTH).mean())


W = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)


def layer() -> onnx.ModelProto:
    proto = text_model("agraph (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w> { y = MatMul(x, w) }")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(W, "w"))
    del proto.graph.value_info[:]
    return proto


def trained(**options: Any) -> tuple[Masks, Trainer, LossJudge]:
    """y = x w learns to give 0 by SGD, 8 steps an epoch, with a mask on w."""
    given: dict[str, Any] = {
        "loss": "mse",
        "labels": ("t",),
        "batch_size": "8",
        "optimizer": "sgd",
        "epochs": 1,
    }
    recipe = PruneRecipe(**{**given, "lr": 0.1, **options})
    model, judge = load(layer()), LossJudge()
    masks = Masks(recipe, model)
    trainer = Trainer(
        to_torch(model),
        parse_loss(recipe.loss).bound(["y"], ["t"], ["t", "x"]),
        dataset({"x": X, "t": np.zeros_like(X)}, contract_of(model), seed=recipe.seed, workers=0),
        recipe,
        judge,
        world=World(torch.device("cpu")),
        hooks=[masks],
    )
    trainer.fit()
    return masks, trainer, judge


@pytest.mark.parametrize(("kind", "power"), [("linear", 1), ("cubic", 3)])
def test_the_ramp_is_its_closed_form(kind: Any, power: int) -> None:
    recipe = PruneRecipe(sparsity=0.9, ramp=kind, ramp_begin=0.1, ramp_end=0.6, ramp_updates=10)
    found = ramp(recipe, 200)
    assert list(found) == list(range(30, 121, 10))
    for step, share in found.items():
        assert share == pytest.approx(1 - (1 - (step - 20) / 100) ** power)
    assert found[120] == 1.0


def test_ramps_of_short_trainings_end_in_time() -> None:
    assert ramp(PruneRecipe(sparsity=0.9), 100) == {0: 1.0}
    assert ramp(PruneRecipe(sparsity=0.9, ramp="cubic"), 1) == {0: 1.0}
    assert max(ramp(PruneRecipe(ramp="cubic", ramp_end=0.999), 4)) == 3
    assert ramp(PruneRecipe(score="taylor"), 100) == {16: 1.0}
    assert ramp(PruneRecipe(score="taylor"), 6) == {3: 1.0}


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.9},
        {"sparsity": 0.9, "scope": "layer", "optimizer": "sgd{momentum=0.9}", "lr": 0.01},
        {"nm": "2:4"},
        {"sparsity": 0.8, "ramp": "cubic", "ema": 0.9, "weight_decay": 0.01},
        {"sparsity": 0.8, "ramp": "linear", "score": "taylor", "rewind": 2},
        {"sparsity": 0.8, "batchnorm": True},
    ],
)
def test_masks_hold_to_the_element_in_the_written_file(options: dict[str, Any]) -> None:
    result = prune(digits_cnn(), DATA, labels="y", epochs=3, **{"lr": 3e-3, **options})
    report = result.report
    written = onnx.ModelProto.FromString(ir.to_proto(result.graph).SerializeToString())
    eligible = [one for one in sparsity(load(written)) if one.elements > 200]
    share = sum(one.zeros for one in eligible) / sum(one.elements for one in eligible)
    if "nm" in options:
        for name, kept in kept_elements(load(written)).items():
            if kept.shape[1] % 4 == 0 and kept.ndim == 4:
                lines = np.moveaxis(kept, 1, -1).reshape(-1, 4)
                assert (lines.sum(1) <= 2).all(), name
    else:
        assert share == pytest.approx(options["sparsity"], abs=0.02)
        if options.get("scope") == "layer":
            assert {round(one.share, 2) for one in eligible} == {0.9}
    assert report.ok
    assert report.choice.before > report.choice.after - 1e-9 or report.choice.after > 0.9
    assert any(note.startswith("without training: accuracy") for note in report.notes)
    assert any("of the weights are zero: no faster" in note for note in report.notes)
    assert not any(np.signbit(array[array == 0]).any() for array in _arrays(written))


def _arrays(proto: onnx.ModelProto) -> list[np.ndarray]:
    return [array for one in proto.graph.initializer if (array := onnx.numpy_helper.to_array(one)).ndim == 4]


def test_what_is_zero_before_stays_zero_and_gets_no_gradient() -> None:
    masks, trainer, judge = trained(sparsity=0.75, optimizer="sgd{momentum=0.9}")
    gone = np.abs(W) < np.sort(np.abs(W), axis=None)[48]
    after = judge.seen[-1]["w"].numpy()
    np.testing.assert_array_equal(after == 0, gone)
    np.testing.assert_array_equal(~masks.kept["w"].numpy(), gone)
    gradient = trainer.trained["w"].grad
    assert gradient is not None
    assert not gradient.numpy()[gone].any()
    assert gradient.numpy()[~gone].all()


def test_zeros_are_chosen_anew_by_what_the_weights_have_become() -> None:
    masks, _, judge = trained(
        sparsity=0.5, ramp="linear", ramp_begin=0.25, ramp_end=0.75, ramp_updates=2, lr=1.0
    )
    first = np.abs(W) < np.sort(np.abs(W), axis=None)[32]
    now = ~masks.kept["w"].numpy()
    assert now.sum() == 32
    assert (now != first).any()
    np.testing.assert_array_equal(judge.seen[-1]["w"].numpy() == 0, now)


@pytest.mark.parametrize(
    "options", [{}, {"clip_value": 1e-3}, {"clip_norm": 0.05}, {"accumulate": 4}, {"l2": 3.0}]
)
def test_first_order_scores_are_of_the_loss_alone_and_of_weights_before_the_step(
    options: dict[str, Any],
) -> None:
    """The sum over steps of |w g|, where g is the gradient of the loss, whatever is made of it then."""
    how: dict[str, Any] = {"score": "taylor", "ramp_begin": 0.999, "ramp_end": 0.999, "options": "small=0"}
    masks, trainer, judge = trained(sparsity=0.5, lr=0.5, evaluate=1, **how, **options)
    assert (masks.final, trainer.total) == (True, 8)
    x = torch.from_numpy(X)
    order = np.random.default_rng((0, 0, 0)).permutation(64).reshape(8, 8)
    heard = np.zeros_like(W)
    before = [torch.from_numpy(W), *(seen["w"] for seen in judge.seen)]
    for rows, was in zip(order, before, strict=False):
        w = was.clone().requires_grad_()
        (x[rows] @ w).square().mean().backward()
        assert w.grad is not None
        heard += np.abs(was.numpy() * w.grad.numpy())
    gone = heard <= np.sort(heard, axis=None)[31]
    np.testing.assert_array_equal(~masks.kept["w"].numpy(), gone)


def test_frozen_weights_stay_as_they_are_and_are_of_no_share() -> None:
    proto = text_model(
        "agraph (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w, float[8, 8] v> {"
        " a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    )
    for name, array in (("w", W), ("v", W / 100)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    result = prune(proto, {"x": X}, freeze=["v"], sparsity=0.75, epochs=2, lr=0.01, max_drop="")
    now = {name: one.const_value for name, one in result.graph.graph.initializers.items()}
    np.testing.assert_array_equal(now["v"].numpy(), W / 100)  # type: ignore[union-attr]
    assert (now["w"].numpy() == 0).sum() == 48  # type: ignore[union-attr]
    (said,) = (note for note in result.report.notes if "zero" in note)
    assert said.startswith("75.0% of the weights are zero")
    assert said.endswith("; 1 frozen ones stay as they are, and do not count")


def test_rewinding_brings_an_early_step_back_under_the_last_mask() -> None:
    masks, trainer, judge = trained(
        sparsity=0.5, ramp_begin=0.999, ramp_end=0.999, rewind=0, optimizer="sgd{momentum=0.9}"
    )
    kept = masks.kept["w"].numpy()
    np.testing.assert_array_equal(judge.seen[-1]["w"].numpy(), np.where(kept, W, 0))
    assert (kept.sum(), len(trainer.optimizer.state), masks._early) == (32, 0, {})


@pytest.mark.parametrize("at", [5, 13])
def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path, at: int) -> None:
    options: dict[str, Any] = {
        "epochs": 4,
        "sparsity": 0.8,
        "ramp": "cubic",
        "score": "taylor",
        "rewind": 3,
        "interval": 2,
        "options": "small=0",
        "batch_size": 16,
        "data": {"x": X, "t": 2 * X},
        "ramp_updates": 4,
    }
    whole, again = whole_and_resumed(partial(prune, layer(), **options), tmp_path / "t", at)
    assert ir.to_proto(again.graph).SerializeToString() == ir.to_proto(whole.graph).SerializeToString()
    assert again.report.curves == whole.report.curves


def test_masks_of_a_checkpoint_go_to_where_the_weights_are() -> None:
    masks, _, _ = trained(score="taylor", sparsity=0.5, options="small=0")
    state = {**masks.state_dict(), "heard": {"w": torch.ones(8, 8)}}
    masks.weights["w"] = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    masks.load_state_dict(state)
    assert (masks.kept["w"].device.type, masks._heard["w"].device.type) == ("meta", "meta")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 1.0}, "sparsity, ramp_begin"),
        ({"ramp_begin": 0.8}, "sparsity, ramp_begin"),
        ({"ramp_updates": 0}, "ramp_updates: 0 is less than 1"),
        ({"nm": "2:4", "ramp": "cubic"}, "N:M does not grow"),
        ({"nm": "4:2"}, "nm is '4:2'; expected such as 2:4"),
        ({"score": "wanda"}, "score: .*wanda"),
        ({"options": "smal=3"}, "no option 'smal'|unknown option 'smal'"),
        ({"options": "small=9999"}, "pruned: the weight has fewer than 9999 elements; options=small=0"),
        ({"data": None}, "nothing to train on"),
    ],
)
def test_bad_input_is_told_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        prune(layer(), **{"data": {"x": X}, "epochs": 1, **options})
    assert "\n" not in str(caught.value)


@pytest.fixture(name="place")
def folder_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(digits_cnn(), "m.onnx")
    np.savez("in.npz", image=IMAGES)
    np.savez("train.npz", image=IMAGES, y=LABELS)
    Path("how.toml").write_text('epochs = 6\nlr = 0.005\nbatch_size = "16"\n')
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert isinstance(done.value.code, int)
    return done.value.code


def test_prune_recovers_what_it_lost_in_one_command(place: Path) -> None:
    cut = (
        "prune",
        "m.onnx",
        "--channels",
        "--macs",
        "0.08",
        "--data",
        "in.npz",
        "--target",
        "generic",
        "--no-bench",
    )
    assert run(*cut, "-o", "cut.onnx") == 0
    assert (
        run(*cut, "-o", "out.onnx", "--recover", "--recover-with", "how.toml", "--json", "report.json") == 0
    )
    before, after = (accuracy(onnx.load(name)) for name in ("cut.onnx", "out.onnx"))
    assert before < 0.9
    assert after > before + 0.05
    shapes = [
        [tuple(one.dims) for one in onnx.load(name).graph.initializer] for name in ("cut.onnx", "out.onnx")
    ]
    assert shapes[0] == shapes[1]
    report = json.loads(Path("report.json").read_text())
    assert (report["schema"], report["recovered"]["command"]) == ("onnxopt.prune/1", "recover")
    assert report["recovered"]["final"]["after"] > report["recovered"]["final"]["before"]
    assert report["recovered"]["source"] == "m.onnx"
    assert load("out.onnx").metadata_props["onnxopt.passes"].startswith("prune-channels{macs=0.08")


def test_recovery_that_fails_is_not_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = ("prune", "m.onnx", "--channels", "--macs", "0.5", "--data", "in.npz", "--no-bench")
    Path("how.toml").write_text("epochs = 1\nlr = 1.0\n")
    assert run(*cut, "-o", "cut.onnx") == 0
    capsys.readouterr()
    assert run(*cut, "-o", "out.onnx", "--recover", "--recover-with", "how.toml") == 0
    said = capsys.readouterr().out
    assert "what is written was not trained: " in said
    assert "nothing was written" not in said
    assert Path("out.onnx").read_bytes() == Path("cut.onnx").read_bytes()


def test_recovery_keeps_zeros(place: Path) -> None:
    cut = ("prune", "m.onnx", "--weights", "--sparsity", "0.8", "--data", "in.npz", "--no-bench")
    Path("how.toml").write_text("epochs = 2\nlr = 0.003\n")
    assert run(*cut, "-o", "cut.onnx") == 0
    assert (
        run(*cut, "-o", "out.onnx", "--recover", "--recover-with", "how.toml", "--metric", "agreement") == 0
    )
    before, after = (kept_elements(load(name)) for name in ("cut.onnx", "out.onnx"))
    for name, kept in before.items():
        np.testing.assert_array_equal(after[name] & ~kept, False)
    assert zeros(load("out.onnx")) >= 0.7


def test_train_prune_from_the_command_line(place: Path) -> None:
    arguments = ("train", "prune", "m.onnx", "-o", "out.onnx", "--data", "train.npz", "--labels", "y")
    assert run(*arguments, "--sparsity", "0.7", "--ramp", "cubic", "--epochs", "4", "--lr", "0.003") == 0
    assert zeros(load("out.onnx")) == pytest.approx(0.7, abs=0.05)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recover",), "give --data"),
        (("--data", "in.npz", "--recover-with", "how.toml"), "--recover-with is of --recover"),
        (("--data", "in.npz", "--recover", "--cluster", "bits=4"), "cluster the result"),
        (("--data", "in.npz", "--recover", "--recover-with", "no.toml"), "no.toml: cannot be read"),
    ],
)
def test_bad_usage_of_recover_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert run("prune", "m.onnx", "-o", "out.onnx", "--channels", "--no-bench", *more) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out.onnx").exists()


def test_recovery_without_torch_says_what_to_install(place: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom onnxopt.cli import main; main(sys.argv[1:])"
    arguments = ["prune", "m.onnx", "-o", "out.onnx", "--channels", "--data", "in.npz", "--recover"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "onnxopt: training needs torch: pip install 'onnxopt[train]'\n"
