"""Ranges chosen from statistics, held against quantizing the elements themselves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.calibration import METHODS, Range, TensorStatistics, choose_range
from onnxopt.errors import UsageError
from onnxopt.quantization.formats import FORMATS, dequantize, params_from_range, quantize


def statistics_of(*arrays: np.ndarray, held_out: np.ndarray | None = None) -> TensorStatistics:
    stats = TensorStatistics()
    for array in arrays:
        stats.observe(array)
    if held_out is not None:
        stats.held_out.add(held_out)
    return stats


def true_error(x: np.ndarray, found: Range, form: str, *, symmetric: bool, power_of_two: bool) -> float:
    params = params_from_range(
        found.low, found.high, FORMATS[form], symmetric=symmetric, power_of_two=power_of_two
    )
    back = dequantize(quantize(x, params), params).astype(np.float64)
    return float(np.mean((back - x) ** 2))


def samples_of(kind: str, size: int = 50_000) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(size)
    if kind == "relu":
        x = np.maximum(x, 0)
    elif kind == "swish":
        x = x / (1 + np.exp(-x))
    elif kind == "outlier":
        x[:10] *= 100
    elif kind == "extreme":
        x[:5] *= 10_000
    elif kind == "heavy":
        x = rng.laplace(size=size) ** 3
    return x.astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("form", "symmetric", "power_of_two"),
    [
        ("int8", True, False),
        ("uint8", False, False),
        ("int8", False, True),
        ("uint8", True, False),
        ("int16", True, False),
        ("int4", True, False),
        ("float8e4m3fn", True, False),
        ("float8e5m2", True, False),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "relu", "swish", "outlier", "extreme", "heavy"])
def test_the_error_told_is_that_of_quantizing(
    kind: str, form: str, symmetric: bool, power_of_two: bool, method: str
) -> None:
    x = samples_of(kind)
    found = choose_range(
        statistics_of(x), method, FORMATS[form], symmetric=symmetric, power_of_two=power_of_two
    )
    truth = true_error(x, found, form, symmetric=symmetric, power_of_two=power_of_two)
    assert found.low <= 0 <= found.high
    # five elements of the extreme ones, or those below 2^-16 of the largest, may make up the whole error
    loose = kind == "extreme" or form == "int16"
    assert found.error == pytest.approx(truth, rel=0.5 if loose else 0.03)


@pytest.mark.parametrize("method", ["mse", "auto"])
@pytest.mark.parametrize("form", ["int8", "uint8", "int4"])
@pytest.mark.parametrize("kind", ["normal", "relu", "swish", "outlier", "extreme", "heavy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_searching_comes_near_the_best_of_a_dense_grid(
    kind: str, form: str, symmetric: bool, method: str
) -> None:
    if symmetric and form == "uint8" and kind == "relu":
        return  # half of the levels are lost: covered by the other forms
    x = samples_of(kind, 5_000)
    found = choose_range(statistics_of(x), method, FORMATS[form], symmetric=symmetric)
    low, high = float(min(x.min(), 0)), float(max(x.max(), 0))
    parts = 2.0 ** -np.arange(0, 12, 0.1)
    ends = [(low * part, high * part) for part in parts]
    if not symmetric:
        ends += [(low, high * part) for part in parts] + [(low * part, high) for part in parts]
    if symmetric:
        ends = [(-max(-a, b), max(-a, b)) for a, b in ends]
    best = min(
        true_error(x, Range(a, b, "", 0.0), form, symmetric=symmetric, power_of_two=False) for a, b in ends
    )
    truth = true_error(x, found, form, symmetric=symmetric, power_of_two=False)
    # a handful of extreme elements is most of the error of 4 bits: it jumps with each level that meets one
    assert truth <= best * (1.25 if (kind, form) == ("extreme", "int4") else 1.1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentiles_are_those_of_the_elements(symmetric: bool) -> None:
    x = samples_of("swish")
    found = choose_range(statistics_of(x), "percentile", FORMATS["int8"], symmetric=symmetric)
    if symmetric:
        assert found.high == -found.low == pytest.approx(np.quantile(np.abs(x), 1 - 1e-4), rel=0.01)
    else:
        assert found.low == pytest.approx(np.quantile(x, 0.5e-4), rel=0.01)
        assert found.high == pytest.approx(np.quantile(x, 1 - 0.5e-4), rel=0.01)


def test_average_is_the_mean_of_the_samples_ends() -> None:
    stats = statistics_of(np.array([-1, 3], np.float32), np.array([-2, 8], np.float32))
    found = choose_range(stats, "average", FORMATS["int8"], symmetric=False)
    assert (found.low, found.high) == (-1.5, 5.5)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_rare_outliers_are_left_outside(method: str) -> None:
    x = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    x[:3] = [100, -90, 80]
    stats = statistics_of(x)
    assert choose_range(stats, "min-max", FORMATS["int8"], symmetric=True).high == 100
    bound = 80 if method == "mse" else 8  # three elements so far out still weigh much in a mean square
    found = choose_range(stats, method, FORMATS["int8"], symmetric=True)
    assert 3 < found.high < bound
    other = choose_range(stats, method, FORMATS["int8"], symmetric=False)
    assert other.low < -2
    assert 2 < other.high < bound


def test_one_end_may_be_cut_alone() -> None:
    x = np.random.default_rng(0).exponential(size=100_000).astype(np.float32)
    x[:2000] = np.random.default_rng(1).uniform(-0.5, 0, 2000)
    x[:4] = 200
    for method in ("entropy", "mse"):
        found = choose_range(statistics_of(x), method, FORMATS["uint8"], symmetric=False)
        assert found.high < 195
        assert -0.51 < found.low < -0.3


def test_entropy_keeps_what_the_levels_show_in_full() -> None:
    x = np.repeat(np.arange(1, 9), [8, 4, 6, 6, 2, 4, 1, 1]).astype(np.float32)
    wide = choose_range(statistics_of(x), "entropy", FORMATS["uint8"], symmetric=False)
    assert (wide.low, wide.high) == (0, 8)


def test_auto_judges_by_what_was_held_out() -> None:
    rng = np.random.default_rng(0)
    given = rng.standard_normal(50_000).astype(np.float32)
    given[:5] = 30
    near, far = rng.standard_normal((2, 20_000)).astype(np.float32)
    far[:200] = 30
    for held_out in (near, far):
        stats = statistics_of(given, held_out=held_out)
        found = choose_range(stats, "auto", FORMATS["int8"], symmetric=True)
        compared = [method for method in METHODS if method not in ("entropy", "auto")]
        every = [choose_range(stats, method, FORMATS["int8"], symmetric=True) for method in compared]
        assert found == min(every, key=lambda one: one.error)
        truth = true_error(held_out, found, "int8", symmetric=True, power_of_two=False)
        assert found.error == pytest.approx(truth, rel=0.05)
    wide = choose_range(statistics_of(given, held_out=far), "auto", FORMATS["int8"], symmetric=True)
    narrow = choose_range(statistics_of(given, held_out=near), "auto", FORMATS["int8"], symmetric=True)
    assert narrow.high < 10 < 25 < wide.high


@pytest.mark.parametrize("method", METHODS)
def test_integers_that_fit_lose_nothing(method: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64)).astype(np.float32)
    found = choose_range(statistics_of(image), method, FORMATS["uint8"], symmetric=False)
    if method in ("min-max", "average", "mse", "auto"):
        assert (found.low, found.high, found.error) == (0, 255, 0)
    assert found.error == pytest.approx(
        true_error(image, found, "uint8", symmetric=False, power_of_two=False), rel=1e-3, abs=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "elements", [[], [0, 0, -0.0], [5.5], [-3, -3], [np.nan, np.inf, 2], [1e-42], [3e38]]
)
def test_odd_tensors_get_a_range(elements: list[float], symmetric: bool, method: str) -> None:
    x = np.array(elements, np.float32)
    found = choose_range(statistics_of(x), method, FORMATS["int8"], symmetric=symmetric)
    finite = x[np.isfinite(x)]
    size = float(np.abs(finite).max(initial=0))
    assert -size <= found.low <= 0 <= found.high <= size
    params = params_from_range(found.low, found.high, FORMATS["int8"], symmetric=symmetric)
    np.testing.assert_allclose(dequantize(quantize(finite, params), params), finite, rtol=0.05, atol=1e-30)
    assert found.error <= (size * 0.05) ** 2 + 1e-60


def test_power_of_two_scales_are_searched_as_they_are() -> None:
    x = samples_of("normal")
    stats = statistics_of(x)
    plain = choose_range(stats, "min-max", FORMATS["int8"], symmetric=True, power_of_two=True)
    found = choose_range(stats, "mse", FORMATS["int8"], symmetric=True, power_of_two=True)
    scale = params_from_range(found.low, found.high, FORMATS["int8"], symmetric=True, power_of_two=True).scale
    assert np.log2(scale) == np.rint(np.log2(scale))
    assert found.error < plain.error / 2


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"unknown calibration method 'entropi' \(did you mean 'entropy'\?\)"
    ):
        choose_range(TensorStatistics(), "entropi", FORMATS["int8"], symmetric=True)
