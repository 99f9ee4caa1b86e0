"""Ranges chosen from statistics, held against quantizing the elements themselves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxopt.calibration import METHODS, Range, TensorStatistics, choose_range
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
