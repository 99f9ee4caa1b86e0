"""The loop on a linear model in float64: its steps have closed forms."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxopt.data.contract import contract_of
from onnxopt.errors import DivergedError, UsageError
from onnxopt.model import load
from onnxopt.training.loop.checkpoints import read_checkpoint
from onnxopt.training.loop.hooks import Hook
from onnxopt.training.loop.trainer import Trainer
from tests.support import text_model
from tests.training.support import Linear, LossJudge, line_data, text_module, trainer

DATA = line_data()
SINGLE = {name: array.astype(np.float32) for name, array in DATA.items()}


def weights(one: Trainer) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in one.module.parameters()])


def floats(one: Trainer) -> Trainer:
    """The trainer, with a model that takes float32."""
    text = "agraph (float[n, 3] x) => (float[n, 3] y) { y = Identity(x) }"
    one.data = dataclasses.replace(one.data, contract=contract_of(load(text_model(text))))
    return one


def descent(steps: int, lr: float, l1: float = 0.0, l2: float = 0.0) -> np.ndarray:
    """Gradient descent on the mean squared error of all samples, in numpy."""
    w, b = np.zeros((3, 1)), np.zeros(1)
    for _ in range(steps):
        error = DATA["x"] @ w + b - DATA["t"]
        step = 2 * DATA["x"].T @ error / len(error) + l1 * np.sign(w) + l2 * w
        w, b = w - lr * step, b - lr * 2 * error.mean(0)
    return np.concatenate([w.ravel(), b])


def test_full_batches_are_gradient_descent() -> None:
    one = trainer(batch_size="full", epochs=4)
    curves = one.fit()
    np.testing.assert_allclose(weights(one), descent(4, 0.1), rtol=1e-12)
    assert curves.loss[0] == pytest.approx((DATA["t"] ** 2).mean())
    assert (one.step, curves.lr, curves.best) == (4, [0.1] * 4, 3)


def test_penalties_are_in_the_gradient() -> None:
    one = trainer(batch_size="full", epochs=3, l1=0.01, l2=0.1)
    one.fit()
    np.testing.assert_allclose(weights(one), descent(3, 0.1, 0.01, 0.1), rtol=1e-12)


@pytest.mark.parametrize("pieces", [2, 5, 20])
def test_a_batch_in_pieces_is_the_batch(pieces: int) -> None:
    whole, split = trainer(batch_size="5"), trainer(batch_size="5", accumulate=pieces)
    whole.fit()
    split.fit()
    np.testing.assert_allclose(weights(split), weights(whole), rtol=1e-12)


def test_stochastic_mini_and_streamed_batches_descend() -> None:
    for size, optimizer in (("1", "sgd"), ("2-4", "sgd{momentum=0.5}"), ("4", "adam")):
        curves = trainer(epochs=30, lr=0.05, batch_size=size, optimizer=optimizer).fit()
        assert curves.loss[-1] < 0.05 < curves.loss[0]
    stream = trainer(source=lambda: [DATA], batch_size="5", steps=9, epochs=100)
    stream.fit()
    assert (stream.step, stream.epoch) == (9, 3)
    with pytest.raises(UsageError, match="steps: a stream has no length"):
        trainer(source=lambda: [DATA])
    with pytest.raises(UsageError, match="epoch 1 gives no samples"):
        trainer(source=list, steps=3).fit()


def test_the_order_of_a_loader_of_torch_is_of_the_seed() -> None:
    """Not of what the process drew before: a resumed run and other processes see the same batches."""
    rows = [{name: array[i] for name, array in DATA.items()} for i in range(len(DATA["t"]))]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def run(drawn: int, **options: Any) -> Any:
        torch.manual_seed(drawn)
        one = trainer(source=loader, batch_size="4", steps=7, epochs=9, **options)
        one.fit()
        return weights(one).tolist()

    assert run(1) == run(2) != run(1, seed=1)


def test_the_schedule_sets_the_rate_of_each_group() -> None:
    one = trainer(epochs=4, batch_size="full", schedule="linear", groups=("bias{lr=3}",))
    assert one.fit().lr == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert one.optimizer.param_groups[1]["lr"] == pytest.approx(0.075)


def test_what_is_frozen_stays() -> None:
    one = trainer(freeze=("bias",))
    one.fit()
    assert weights(one)[3] == 0
    assert weights(one)[0] != 0


def test_gradients_are_clipped() -> None:
    one = trainer(batch_size="full", epochs=1, clip_norm=0.5)
    one.fit()
    assert np.linalg.norm(weights(one)) == pytest.approx(0.05)
    one = trainer(batch_size="full", epochs=1, clip_value=0.25)
    one.fit()
    assert abs(weights(one)).max() == pytest.approx(0.025)


def test_the_average_is_judged_and_the_training_goes_on_with_its_own() -> None:
    judge = LossJudge()
    one = trainer(judge=judge, batch_size="full", epochs=3, ema=0.5)
    one.fit()
    np.testing.assert_allclose(weights(one), descent(3, 0.1), rtol=1e-12)
    a, b, c = (descent(n, 0.1) for n in (1, 2, 3))
    judged = np.concatenate([p.numpy().ravel() for p in judge.seen[-1].values()])
    np.testing.assert_allclose(judged, 0.5 * c + 0.25 * b + 0.25 * a, rtol=1e-12)


def test_the_best_epoch_is_kept_and_patience_ends_the_training() -> None:
    judge = LossJudge([0.1, 0.5, 0.4, 0.5, 0.3, 0.9])
    one = trainer(judge=judge, epochs=6, patience=3, batch_size="full")
    curves = one.fit()
    assert (curves.best, one.epoch, len(judge.kept)) == (3, 5, 3)


def test_low_precision_trains() -> None:
    for precision in ("bfloat16", "float16"):
        module, _ = text_module(
            "agraph (float[n, 3] x) => (float[n, 1] y) <float[3, 1] w = {}> { y = MatMul(x, w) }",
            {"w": (3, 1)},
        )
        curves = floats(trainer(module, SINGLE, precision=precision, epochs=20)).fit()
        assert curves.loss[-1] < 0.4 < curves.loss[0]


class Teacher(Hook):
    """Pulls the output towards 1, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.count = 0

    def start(self, trainer: Trainer) -> None:
        self.calls.append("start")

    def epoch(self, trainer: Trainer, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def loss(self, trainer: Trainer, outputs: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
        return (outputs["y"] - 1).square().flatten(1).mean(1)

    def stepped(self, trainer: Trainer) -> None:
        self.count += 1
        dict(trainer.module.named_parameters())["w"][0] = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def test_hooks_add_losses_and_change_what_is_trained(tmp_path: Path) -> None:
    hook = Teacher()
    one = trainer(hooks=[hook], folder=tmp_path, epochs=2, batch_size="full")
    one.objective = None
    curves = one.fit()
    assert hook.calls == ["start", "epoch 0", "epoch 1"]
    assert curves.loss[0] == pytest.approx(1)
    assert weights(one)[0] == 0
    again = Teacher()
    trainer(hooks=[again], folder=tmp_path, epochs=2, batch_size="full").fit(resume=True)
    assert again.count == hook.count == 2


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_resumed_training_is_the_training(stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "epochs": 3,
        "batch_size": "4",
        "optimizer": "adam",
        "ema": 0.9,
        "schedule": "cosine",
        "interval": 1,
        "transforms": ("noise{input=x,std=0.1}",),
    }

    class Killed(Hook):
        def stepped(self, trainer: Trainer) -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = trainer(folder=tmp_path / "a", **options)
    curves = whole.fit()
    with pytest.raises(KeyboardInterrupt):
        trainer(folder=tmp_path / "b", hooks=[Killed()], **options).fit()
    rest = trainer(folder=tmp_path / "b", hooks=[Hook()], **options)
    assert vars(rest.fit(resume=True)) == vars(curves)
    np.testing.assert_array_equal(weights(rest), weights(whole))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in "ab"]
    assert logs[0] == logs[1]
    rows = [json.loads(line) for line in logs[0].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    assert {"score", "mean_loss"} < set(rows[3])


def test_checkpoints_of_something_else_or_damaged_are_refused(tmp_path: Path) -> None:
    trainer(folder=tmp_path, made_for="a", epochs=1).fit()
    assert read_checkpoint(tmp_path / "checkpoint.pt", "a") is not None
    with pytest.raises(UsageError, match="is of another model or recipe"):
        trainer(folder=tmp_path, made_for="b", epochs=1).fit(resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match="is no checkpoint, or damaged"):
        trainer(folder=tmp_path, epochs=1).fit(resume=True)


def test_mixup_mixes_losses_as_it_mixes_inputs() -> None:
    """One weight, one step of all samples: the gradient has a closed form in the shares."""
    one = trainer(batch_size="full", epochs=1, transforms=("mixup{alpha=0.4}",))
    (_, (batch,)), *_ = one.data.batches(one._sizes, 0, 1)
    one.fit()
    assert batch.shares is not None
    share, x, t = batch.shares[:, None].astype(np.float64), batch.arrays["x"], batch.arrays["t"]
    mixed = share * x + (1 - share) * x[::-1]
    error = share * -t + (1 - share) * -t[::-1]
    wanted = [*(-0.1 * 2 * (mixed * error).mean(0)), -0.1 * 2 * error.mean()]
    np.testing.assert_allclose(weights(one), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("input", "step 2: the loss is nan; first not finite: 'x'"),
        ("label", "step 2: the loss is nan; first not finite: 't'"),
        ("rate", "step [2-9]: the loss is .*; first not finite: .*; take a lower lr, or clip_norm"),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_culprit(spoil: str, told: str) -> None:
    data = {name: array.copy() for name, array in DATA.items()}
    if spoil != "rate":
        order = np.random.default_rng((0, 0, 0)).permutation(12)
        data[{"input": "x", "label": "t"}[spoil]][order[5]] = np.nan
    with pytest.raises(DivergedError, match=told):
        trainer(source=data, batch_size="4", lr=1e120 if spoil == "rate" else 0.1).fit()


def test_the_culprit_is_the_first_hidden_tensor_in_the_order_of_the_graph() -> None:
    module, _ = text_module(
        "agraph (float[n, 3] x) => (float[n, 1] y) <float[3, 1] w = {}, float[1] c = {}>"
        "{ a = MatMul(x, w) b = Log(a) d = Sub(b, b) y = Add(d, c) }",
        {"w": (3, 1), "c": (1,)},
    )
    one = floats(trainer(module, SINGLE, epochs=1))
    with pytest.raises(DivergedError, match="step 1: the loss is nan; first not finite: 'b'; look at"):
        one.fit()


def test_what_the_graph_cannot_run_is_told() -> None:
    with pytest.raises(UsageError, match=r"train: step 1 on x 12x3, t 12x1 failed: mat1 and mat2 shapes"):
        trainer(Linear(4), batch_size="full").fit()


def test_tensorboard_is_asked_for_in_one_line_where_it_is_missing(tmp_path: Path) -> None:
    one = trainer(folder=tmp_path, epochs=1, tensorboard=True)
    if importlib.util.find_spec("tensorboard"):
        one.fit()
        assert list(tmp_path.glob("events.*"))
    else:
        with pytest.raises(UsageError, match="pip install tensorboard"):
            one.fit()
