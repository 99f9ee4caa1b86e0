"""Losses against closed forms in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from onnxopt.errors import UsageError
from onnxopt.training.loop.losses import LOSSES, parse_loss


def one(spec: str, y: np.ndarray, target: np.ndarray) -> np.ndarray:
    objective = parse_loss(spec).bound(["y"], ["t"], ["t"])
    found = objective({"y": torch.from_numpy(y)}, {"t": torch.from_numpy(target)})
    return np.array([float(value) for value in found])


def log_softmax(y: np.ndarray) -> np.ndarray:
    found: np.ndarray = y - np.log(np.exp(y).sum(-1, keepdims=True))
    return found


RNG = np.random.default_rng(0)
Y, T = RNG.normal(size=(2, 5, 4))
CLASSES = np.array([0, 3, 1, 1, 2])


@pytest.mark.parametrize(
    ("spec", "target", "expected"),
    [
        ("cross-entropy", CLASSES, -log_softmax(Y)[np.arange(5), CLASSES]),
        (
            "cross-entropy{smoothing=0.1}",
            CLASSES,
            -0.9 * log_softmax(Y)[np.arange(5), CLASSES] - 0.1 * log_softmax(Y).mean(1),
        ),
        ("cross-entropy", np.exp(log_softmax(T)), -(np.exp(log_softmax(T)) * log_softmax(Y)).sum(1)),
        ("mse", T, ((Y - T) ** 2).mean(1)),
        ("l1", T, abs(Y - T).mean(1)),
        ("bce", (T > 0).astype(np.float64), (np.log1p(np.exp(Y)) - (T > 0) * Y).mean(1)),
        (
            "kl{temperature=2}",
            T,
            4 * (np.exp(log_softmax(T / 2)) * (log_softmax(T / 2) - log_softmax(Y / 2))).sum(1),
        ),
        (
            "kl{target=probabilities}",
            np.exp(log_softmax(T)),
            (np.exp(log_softmax(T)) * (log_softmax(T) - log_softmax(Y))).sum(1),
        ),
        ("cosine", T, 1 - (Y * T).sum(1) / np.linalg.norm(Y, axis=1) / np.linalg.norm(T, axis=1)),
        ("0.5*mse + 2e-1*l1", T, 0.5 * ((Y - T) ** 2).mean(1) + 0.2 * abs(Y - T).mean(1)),
    ],
)
def test_closed_forms(spec: str, target: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(one(spec, Y, target), expected, rtol=1e-12)


def test_ctc_is_the_sum_over_all_alignments() -> None:
    y = RNG.normal(size=(2, 4, 3))
    target = np.array([[1, 2], [2, -1]])
    wanted = []
    for odds, label in zip(log_softmax(y), target, strict=True):
        word, total = [c for c in label if c >= 0], -np.inf
        for path in itertools.product(range(3), repeat=4):
            merged = [c for c, _ in itertools.groupby(path) if c]
            if merged == word:
                total = np.logaddexp(total, sum(odds[t, c] for t, c in enumerate(path)))
        wanted.append(-total / len(word))
    np.testing.assert_allclose(one("ctc", y, target), wanted, rtol=1e-10)


@pytest.mark.parametrize("axis", [1, -1])
def test_classes_are_on_axis_1_or_the_last_and_ignored_elements_do_not_count(axis: int) -> None:
    y = RNG.normal(size=(2, 3, 4))
    label = np.array([[0, 2, -100], [1, -100, -100]])
    odds = log_softmax(y)
    wanted = [-(odds[0, 0, 0] + odds[0, 1, 2]) / 2, -odds[1, 0, 1]]
    np.testing.assert_allclose(one("cross-entropy", np.moveaxis(y, -1, axis).copy(), label), wanted)


def test_a_sum_over_outputs_and_labels_by_name() -> None:
    objective = parse_loss("mse@a=u+0.5*l1@b=v").bound(["a", "b"], ["u", "v"], ["u", "v"])
    outputs = {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}
    arrays = {"u": torch.zeros(1, 2), "v": torch.full((1, 2), 3.0)}
    assert objective(outputs, arrays).tolist() == [2.0]


def test_a_function_of_the_user() -> None:
    objective = parse_loss(lambda outputs, arrays: outputs["y"].sum() - arrays["t"].sum())
    assert float(objective({"y": torch.ones(3)}, {"t": torch.ones(2)})) == 1.0


def test_half_precision_is_worked_out_in_float32() -> None:
    y = torch.full((1, 4), 30000.0, dtype=torch.float16)
    objective = parse_loss("mse").bound(["y"], ["t"], ["t"])
    assert float(objective({"y": y}, {"t": torch.zeros(1, 4)})) == 9e8


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("cros-entropy", r"unknown loss 'cros-entropy' \(did you mean 'cross-entropy'\?\)"),
        ("mse{t=1}", "mse: unknown option 't'"),
        ("mse@", "cannot read 'mse@'"),
        ("1.2.3*mse", "'1.2.3' is no number"),
        ("mse@z", r"there is no output 'z'"),
        ("mse=z", r"there is no label 'z'"),
    ],
)
def test_what_cannot_be_read_is_told(spec: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        one(spec, Y, T)


def test_shapes_that_do_not_match_are_told() -> None:
    for name in sorted(set(LOSSES) - {"cross-entropy", "ctc"}):
        with pytest.raises(UsageError, match="the label is 5 x 3 where 5 x 4 goes with the output"):
            one(name, Y, T[:, :3])
    with pytest.raises(UsageError, match="the label is 4 where 5 goes with the output"):
        one("cross-entropy", Y, CLASSES[:4])
    with pytest.raises(UsageError, match=r"2 possible labels \(u, v\)"):
        parse_loss("mse").bound(["y"], ["u", "v"], ["u", "v"])
