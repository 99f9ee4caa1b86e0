"""The histogram: exact counts, whatever the order and the pieces."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.calibration import ChannelStatistics, Histogram, Statistics, TensorStatistics
from onnxopt.calibration.histogram import BINS
from onnxopt.errors import UsageError

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
ARRAYS = st.lists(st.lists(FLOATS, max_size=20), min_size=1, max_size=6)


def histogram_of(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    return histogram


def content(histogram: Histogram) -> tuple[object, ...]:
    return (
        histogram.count,
        histogram.nonfinite,
        histogram.zeros,
        histogram.whole,
        histogram.minimum,
        histogram.maximum,
        histogram.top,
        histogram.counts.tobytes(),
    )


@given(lists=ARRAYS, seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_order_pieces_and_merging_change_nothing(lists: list[list[float]], seed: int) -> None:
    arrays = [np.array(one, np.float32) for one in lists]
    together = np.concatenate(arrays)
    shuffled = np.random.default_rng(seed).permutation(together)
    merged = functools.reduce(Histogram.merge, map(histogram_of, arrays))
    want = content(histogram_of(together))
    assert content(histogram_of(*arrays)) == want
    assert content(histogram_of(*arrays[::-1])) == want
    assert content(histogram_of(shuffled)) == want
    assert content(merged) == want


@given(lists=ARRAYS)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_bins_hold_all_finite_elements_where_they_are(lists: list[list[float]]) -> None:
    x = np.concatenate([np.array(one, np.float32) for one in lists])
    finite = x[np.isfinite(x)].astype(np.float64)
    histogram = histogram_of(x)
    bins = histogram.bins()
    assert bins.weight.sum() == histogram.count == finite.size
    assert histogram.nonfinite == x.size - finite.size
    assert (bins.left <= bins.right).all()
    if finite.size:
        assert (histogram.minimum, histogram.maximum) == (finite.min(), finite.max())
        for left, right, weight in zip(bins.left, bins.right, bins.weight, strict=True):
            assert ((finite >= left - 4.6e-41) & (finite <= right + 4.6e-41)).sum() >= weight


def test_bins_follow_the_density_and_merge() -> None:
    x = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    histogram = histogram_of(x)
    fine, merged = histogram.bins(), histogram.bins(merged=4)
    assert (fine.right - fine.left)[1:-1].max() <= np.abs(x).max() / 256
    for bins in (fine, merged):
        upto = np.searchsorted(np.sort(x), bins.right, side="left")
        inside = (bins.left > -2) & (bins.right < 2) & (bins.left != bins.right)
        np.testing.assert_allclose(np.cumsum(bins.weight)[inside], upto[inside], atol=2)


def test_a_negative_zero_is_zero() -> None:
    histogram = histogram_of(np.array([-0.0, 0.0, -0.0], np.float32), np.array([-1, -0.0, 1], np.float32))
    bins = histogram.bins()
    assert (histogram.zeros, histogram.top) == (4, 127)
    assert list(zip(bins.left, bins.right, bins.weight, strict=True)) == [(-1, -1, 1), (0, 0, 4), (1, 1, 1)]


def test_large_arrays_are_counted_as_small_ones() -> None:
    x = np.random.default_rng(0).standard_normal(600_000).astype(np.float32) ** 9
    x[::7], x[1::7], x[5] = 0, -0.0, -1e-43
    assert content(histogram_of(x)) == content(histogram_of(*np.array_split(x, 60)))


def test_an_outlier_leaves_the_bulk_resolved() -> None:
    x = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    histogram = histogram_of(x, np.array([-1000], np.float32))
    inside = histogram.bins().left >= 1
    assert inside.sum() == 256
    assert histogram.counts.nbytes == 2 * BINS * 8


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_counted_as_float32(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype)
    x = np.random.default_rng(0).standard_normal((200, 300)).astype(kind)
    assert content(histogram_of(x)) == content(histogram_of(x.astype(np.float32)))
    assert content(histogram_of(x.T)) == content(histogram_of(x))
    assert histogram_of(np.array([1e300, 1.0])).nonfinite == 1


@pytest.mark.parametrize(
    ("elements", "said"),
    [
        ([], ("no finite element",)),
        ([np.nan], ("no finite element", "1 of 1 elements are NaN or infinite")),
        ([0, 0], ("all zero",)),
        ([2.5, 2.5], ("constant, 2.5",)),
        ([1, 2, 3], ("integers only",)),
        ([0.5, 2, np.inf], ("1 of 3 elements are NaN or infinite",)),
        ([0.5, 2], ()),
    ],
)
def test_what_is_unusual_is_said(elements: list[float], said: tuple[str, ...]) -> None:
    stats = TensorStatistics()
    stats.observe(np.array(elements, np.float32))
    assert stats.remarks == said


@given(lists=ARRAYS, seed=st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_means_are_those_of_exact_sums(lists: list[list[float]], seed: int) -> None:
    from fractions import Fraction

    arrays = [np.array(one, np.float32) for one in lists]
    finite = [one[np.isfinite(one)] for one in arrays]
    exact = [Fraction(float(one.min())) for one in finite if one.size]
    one, other = TensorStatistics(), TensorStatistics()
    for array in arrays:
        one.observe(array)
    for index in np.random.default_rng(seed).permutation(len(arrays)):
        other.observe(arrays[index])
    assert one.samples == len(exact)
    assert one.mean_minimum == (float(sum(exact) / len(exact)) if exact else 0)
    assert (one.mean_minimum, one.mean_maximum) == (other.mean_minimum, other.mean_maximum)


def test_channels_over_samples_of_different_shapes() -> None:
    rng = np.random.default_rng(0)
    arrays = [(rng.standard_normal((1, 3, size)) * 10**size).astype(np.float32) for size in (5, 7, 9)]
    arrays[1][0, 1, 2] = np.nan
    stats = TensorStatistics()
    for array in arrays:
        stats.observe(array, axis=1)
    channel = stats.channel
    assert channel is not None
    for index in range(3):
        x = np.concatenate([array[:, index].ravel() for array in arrays]).astype(np.float64)
        x = x[np.isfinite(x)]
        assert (channel.minimum[index], channel.maximum[index]) == (x.min(), x.max())
        assert channel.count[index] == x.size
        np.testing.assert_allclose(channel.sum[index], x.sum(), rtol=1e-12)
        np.testing.assert_allclose(channel.squares[index], (x**2).sum(), rtol=1e-12)
        np.testing.assert_allclose(channel.mean[index], x.mean(), rtol=1e-12)
    parts = [ChannelStatistics.of(array, 1) for array in arrays]
    backwards = parts[2].merge(parts[1]).merge(parts[0])
    np.testing.assert_array_equal(backwards.sum, channel.sum)
    np.testing.assert_array_equal(backwards.squares, channel.squares)
    with pytest.raises(UsageError, match="channels are to be the same in all samples"):
        stats.observe(np.zeros((1, 4, 2), np.float32), axis=1)


def test_a_file_holds_everything(tmp_path: pytest.TempPathFactory) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "statistics.npz"
    a, b = TensorStatistics(), TensorStatistics()
    for size in (3, 4):
        a.observe(np.linspace(-size, 3e38, 24, dtype=np.float32).reshape(2, 4, 3), axis=1)
        b.observe(np.full(size, -1e-42, np.float32))
    b.held_out.add(np.array([0.5, np.nan], np.float32))
    Statistics({"a": a, "b/1": b}).save(file)
    first = file.read_bytes()
    again = Statistics.load(file)
    assert list(again) == ["a", "b/1"]
    for name, one in (("a", a), ("b/1", b)):
        assert content(again[name].histogram) == content(one.histogram)
        assert content(again[name].held_out) == content(one.held_out)
        assert (again[name].mean_minimum, again[name].samples) == (one.mean_minimum, one.samples)
    assert a.channel is not None
    assert again["a"].channel is not None
    np.testing.assert_array_equal(again["a"].channel.squares, a.channel.squares)
    np.testing.assert_array_equal(again["a"].channel.exact_sum, a.channel.exact_sum)
    again.save(file)
    assert file.read_bytes() == first
    file.write_bytes(first[:-30])
    with pytest.raises(UsageError, match="no calibration statistics, or cut off"):
        Statistics.load(file)
