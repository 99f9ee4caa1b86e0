"""Scores of single elements, and cuts that take exactly so many."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import UsageError
from onnxopt.pruning.saliency import Cut, Scored, lamp, least_of_lines, magnitude, noise
from onnxopt.pruning.weights import StoredWeight, find_weights
from tests.support import text_model

quick = settings(derandomize=True, deadline=None, max_examples=60)


def weight_of(array: np.ndarray) -> StoredWeight:
    model = ir.from_proto(
        text_model("agraph (float[1, 2] x) => (float[?, ?] y) <float[2, 1] w = {1, 2}> { y = MatMul(x, w) }")
    )
    model.graph.initializers["w"].const_value = ir.Tensor(array)
    return find_weights(model)[0]


@quick
@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=30), min_size=1, max_size=4), st.floats(0, 1.2))
def test_a_cut_takes_exactly_the_least(chunks: list[list[int]], share: float) -> None:
    arrays = [np.array(chunk, np.uint32) for chunk in chunks]
    every = np.concatenate(arrays)
    count = round(share * len(every))
    cut = Cut.at(lambda: arrays, count)
    gone = np.concatenate([cut.take(array) for array in arrays])
    assert gone.sum() == min(count, len(every))
    if 0 < gone.sum() < len(every):
        assert every[gone].max() <= every[~gone].min()


@quick
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_of_equal_scores_the_first_go(values: list[int]) -> None:
    keys, count = np.array(values, np.uint32), len(values) // 2
    want = np.zeros(len(values), bool)
    want[np.argsort(keys, kind="stable")[:count]] = True
    np.testing.assert_array_equal(Cut.at(lambda: [keys], count).take(keys), want)


def test_keys_are_ordered_as_scores_and_zeros_come_first() -> None:
    scores = np.array([[-3.0, -0.0, 0.0, 1e-40, 2.5, -1e-40, 7.0]], np.float32)
    array = np.array([[1, 1, 1, 1, 1, 1, 0]], np.float32)
    (keys,) = Scored.of(weight_of(array), lambda name, numbers: scores).ranks()
    assert keys[0, 1] == keys[0, 2]
    assert keys[0, 6] == 0
    order = [0, 5, 1, 3, 4]
    assert (np.diff(keys[0, order].astype(np.int64)) > 0).all()


@pytest.mark.parametrize(
    ("scores", "found"),
    [(np.zeros(3), r"shape \[3\]"), (np.full((1, 2), np.nan), "scores that are not finite")],
)
def test_scores_that_fit_no_weight_are_refused(scores: np.ndarray, found: str) -> None:
    with pytest.raises(UsageError, match=f"scores of 'w': {found}; expected one finite number"):
        list(Scored.of(weight_of(np.ones((1, 2), np.float32)), lambda name, numbers: scores).ranks())


def test_lamp_is_the_square_over_all_that_are_at_least_as_large() -> None:
    numbers = np.array([[3.0, -1.0], [2.0, 1.0]], np.float32)
    np.testing.assert_allclose(lamp("w", numbers), [[1.0, 1 / 15], [4 / 13, 1 / 15]], rtol=1e-6)
    assert (lamp("w", np.zeros((2, 2), np.float32)) == 0).all()


def test_magnitude_and_noise() -> None:
    numbers = np.array([[3.0, -1.0]], np.float32)
    np.testing.assert_array_equal(magnitude("w", numbers), [[3, 1]])
    np.testing.assert_array_equal(noise(1)("w", numbers), noise(1)("w", numbers))
    assert not np.array_equal(noise(1)("w", numbers), noise(2)("w", numbers))
    assert not np.array_equal(noise(1)("w", numbers), noise(1)("v", numbers))


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 13), st.integers(0, 9))
def test_of_each_stretch_all_but_n_go(kept: int, more: int, size: int, seed: int) -> None:
    length = kept + more
    keys = np.random.default_rng(seed).integers(0, 5, (3, size)).astype(np.uint32)
    gone = least_of_lines(keys, np.arange(3 * size).reshape(3, size), more, length)
    for start in range(0, size, length):
        part, left = keys[:, start : start + length], ~gone[:, start : start + length]
        assert (left.sum(1) == min(kept, part.shape[1])).all()
        for row, stays in zip(part, left, strict=True):
            assert not len(row[~stays]) or row[~stays].max() <= row[stays].min()
