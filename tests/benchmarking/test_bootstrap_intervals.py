import numpy as np

from onnxopt.benchmarking.statistics import estimate


def test_value_is_the_exponential_of_the_pooled_median() -> None:
    logs = np.log([[[1.0], [2.0], [4.0]], [[8.0], [0.5], [3.0]]])
    (found,) = estimate(logs, seed=0)
    assert np.isclose(found.value, np.sqrt(2.0 * 3.0))
    assert found.low <= found.value <= found.high


def test_equal_samples_leave_no_doubt() -> None:
    (found,) = estimate(np.full((3, 4, 1), np.log(0.5)), seed=0)
    assert np.allclose([found.value, found.low, found.high], 0.5)


def test_columns_are_independent_and_seeded() -> None:
    logs = np.random.default_rng(1).normal(size=(4, 5, 2))
    both = estimate(logs, seed=3)
    assert both == estimate(logs, seed=3)
    assert both[1] != both[0]
    assert estimate(logs[..., 1:], seed=3)[0] == both[1]


def test_three_samples_give_their_range() -> None:
    (found,) = estimate(np.log([[[0.8], [1.0], [1.5]]]), seed=0)
    assert np.allclose([found.low, found.value, found.high], [0.8, 1.0, 1.5])


def test_interval_knows_that_rounds_of_one_repeat_share_their_sessions() -> None:
    """Sessions differ by 1 %, rounds by 0.1 %: 2000 independent rounds would be exact to 0.01 %."""
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 0.01, (10, 1, 1)) + rng.normal(0, 0.001, (10, 200, 1))
    (found,) = estimate(logs, seed=0)
    assert np.log(found.high / found.low) > 0.005


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    trials, hits = 200, 0
    for trial in range(trials):
        logs = rng.normal(0, 0.01, (16, 1, 1)) + rng.normal(0, 0.03, (16, 20, 1))
        (found,) = estimate(logs, seed=trial, resamples=200)
        hits += found.low <= 1 <= found.high
    assert 0.88 <= hits / trials <= 0.99
