"""Elements that are kept make up for those that go: never worse than magnitude, and often much better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration.compensation import change_summands, damped, square_error
from onnxopt.pruning.informed import _stretches
from onnxopt.pruning.oneshot import prune_rows


def problem(groups: int, rows: int, summands: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the second moments of inputs that are correlated."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((groups, summands, summands)) / np.sqrt(summands) + np.eye(summands)
    inputs = rng.standard_normal((groups, 4 * summands, summands)) @ mixing
    return rng.standard_normal((groups, rows, summands)), inputs.swapaxes(1, 2) @ inputs


def least(rows: np.ndarray, count: int) -> np.ndarray:
    gone = np.zeros(rows.size, bool)
    gone[np.argsort(np.abs(rows).reshape(-1), kind="stable")[:count]] = True
    return gone.reshape(rows.shape)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_as_many_go_and_the_sums_are_no_worse(
    groups: int, height: int, summands: int, share: float, seed: int
) -> None:
    rows, moments = problem(groups, height, summands, seed)
    gone = least(rows, round(share * rows.size))
    found = prune_rows(rows, moments, gone, None, 0)
    assert np.count_nonzero(found == 0) == gone.sum()
    plain = np.where(gone, 0, rows)
    assert square_error(found - rows, moments).sum() <= square_error(plain - rows, moments).sum()


def test_on_correlated_inputs_the_error_is_a_fraction() -> None:
    for seed in range(5):
        rows, moments = problem(1, 32, 256, seed)
        gone = least(rows, rows.size // 2)
        found = square_error(prune_rows(rows, moments, gone, None, 0) - rows, moments).sum()
        assert found < 0.8 * square_error(np.where(gone, 0, rows) - rows, moments).sum()


def test_two_summands_that_are_the_same_stand_in_for_each_other() -> None:
    rows = np.array([[[1.0, 2.0]]])
    moments = np.array([[[1.0, 1.0], [1.0, 1.0]]])
    found = prune_rows(rows, moments, np.array([[[True, False]]]), None, 0)
    np.testing.assert_allclose(found, [[[0, 3]]], rtol=0.02)


def test_the_last_change_leaves_the_least_squares_solution() -> None:
    rows, moments = problem(1, 3, 5, 0)
    moments += np.eye(5) * 1e3  # damping of 1 % of the mean is what both have
    damped = moments + 0.01 * np.diagonal(moments[0]).mean() * np.eye(5)
    found = change_summands(rows, moments, [5], lambda i, left, _: left[..., i] * (i > 1))
    free, fixed = damped[0][2:, 2:], damped[0][2:, :2]
    want = rows[0, :, 2:] + np.linalg.solve(free, fixed @ rows[0, :, :2].T).T
    np.testing.assert_allclose(found[0, :, 2:], want, rtol=1e-9)
    assert (found[0, :, :2] == 0).all()


def test_what_is_kept_is_the_least_squares_solution_for_it() -> None:
    rows, moments = problem(2, 5, 24, 3)
    found = prune_rows(rows, moments, least(rows, rows.size // 2), None, 0)
    for group in range(2):
        seen = damped(moments)[group]
        for row, have in zip(rows[group], found[group], strict=True):
            kept = np.flatnonzero(have)
            want = np.linalg.solve(seen[kept][:, kept], seen[kept] @ row)
            np.testing.assert_allclose(have[kept], want, rtol=1e-4, atol=1e-5)


def test_inputs_that_never_change_leave_rounding_noise_and_finite_weights() -> None:
    rows, moments = problem(1, 4, 12, 4)
    moments[:, 3] = moments[:, :, 3] = -1e-12
    moments[:, 5] = moments[:, :, 5] = 0
    found = prune_rows(rows, moments, least(rows, 24), None, 0)
    assert np.isfinite(found).all()
    assert np.count_nonzero(found) == 24


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_zeros_stay_zero_and_count(share: float) -> None:
    rows, moments = problem(2, 4, 300, 1)
    rows[..., 150:] *= np.random.default_rng(0).random((2, 4, 150)) < 0.4
    rows[0, 0] = 0
    count = max(round(share * rows.size), int((rows == 0).sum()))
    found = prune_rows(rows, moments, least(rows, count), None, 0)
    assert (found[rows == 0] == 0).all()
    assert np.count_nonzero(found == 0) == count


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (4, 10, 1, 3), (6, 16), (2, 7)])
def test_patterns_run_along_input_channels_at_each_place(shape: tuple[int, ...]) -> None:
    summands = int(np.prod(shape[1:]))
    rows, moments = problem(1, shape[0], summands, 2)
    whole = rows.reshape(*shape)
    gone = np.zeros(shape, bool)
    for start in range(0, shape[1], 4):
        part = np.abs(whole[:, start : start + 4])
        rank = part.argsort(1, kind="stable").argsort(1, kind="stable")
        gone[:, start : start + 4] = rank < part.shape[1] - 2
    found = prune_rows(rows, moments, gone.reshape(rows.shape), _stretches(summands, shape, 4), 2)
    for start in range(0, shape[1], 4):
        left = (found.reshape(shape)[:, start : start + 4] != 0).sum(1)
        assert (left == min(2, shape[1] - start)).all()
    plain = square_error(np.where(gone.reshape(rows.shape), 0, rows) - rows, moments).sum()
    assert square_error(found - rows, moments).sum() <= plain
