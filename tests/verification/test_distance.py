"""The figures of a comparison against their closed forms."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from onnxopt.verification.distance import Distance, distance

RNG = np.random.default_rng(0)
SIGNAL = RNG.standard_normal((4, 10)).astype(np.float32)


def test_sqnr_is_the_ratio_of_energies_over_all_samples() -> None:
    found = Distance()
    found.add(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    found.add(np.array([12.0]), np.array([11.0]))
    assert found.sqnr == pytest.approx(10 * math.log10((9 + 16 + 144) / (0.25 + 1)))
    assert found.max_error == pytest.approx(1 / 12)
    assert found.mismatch == pytest.approx(2 / 3)
    assert found.cosine == pytest.approx((9 + 18 + 132) / math.sqrt(169) / math.sqrt(9 + 20.25 + 121))


def test_equal_outputs_are_infinitely_close() -> None:
    found = distance(SIGNAL, SIGNAL.copy())
    assert found.equal
    assert (found.sqnr, found.max_error, found.top1) == (math.inf, 0.0, 1.0)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e200])
def test_sqnr_does_not_depend_on_the_scale(scale: float) -> None:
    before = np.array([1.0, 1.0, 1.0, 1.0]) * scale
    assert distance(before, before * (1 + 1e-5)).sqnr == pytest.approx(100, abs=0.01)


def test_a_reference_of_zeros_has_no_signal() -> None:
    zeros = np.zeros(4, np.float32)
    assert distance(zeros, zeros).sqnr == math.inf
    assert distance(zeros, zeros + 1e-9).sqnr == -math.inf
    assert distance(zeros, -zeros).equal


def test_nan_and_infinity_must_stand_in_the_same_places() -> None:
    before = np.array([1.0, np.nan, np.inf, -np.inf])
    same = distance(before, before.copy())
    assert same.equal
    assert same.odd == 3
    assert distance(before, np.array([1.0, np.nan, np.inf, np.inf])).strays == 1
    assert distance(before, np.array([np.nan, 2.0, np.inf, -np.inf])).strays == 2
    near = distance(before, np.array([1.1, np.nan, np.inf, -np.inf]))
    assert near.sqnr == pytest.approx(20)
    assert near.strays == 0


def test_integers_booleans_and_strings_are_equal_or_not() -> None:
    assert distance(np.arange(4), np.arange(4)).equal
    assert distance(np.arange(4), np.array([0, 1, 2, 9])).mismatch == 0.25
    assert distance(np.array([True, False]), np.array([True, True])).sqnr == -math.inf
    words = np.array(["a", "b"], dtype=object)
    assert distance(words, words.copy()).equal
    assert distance(words, np.array(["a", "c"], dtype=object)).mismatch == 0.5


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_every_float_type_is_measured(dtype: type) -> None:
    before: np.ndarray = np.array([1, 2, 4, 8]).astype(dtype)
    after: np.ndarray = np.array([1, 2, 4, 9]).astype(dtype)
    assert distance(before, after).sqnr == pytest.approx(10 * math.log10(85 / 1))


def test_shape_type_and_length_are_no_matter_of_tolerance() -> None:
    assert distance(SIGNAL, SIGNAL[:2]).problems == ["shape [4, 10] became [2, 10]"]
    assert distance(SIGNAL, SIGNAL.astype(np.float64)).problems == ["type float32 became float64"]
    assert distance([SIGNAL], [SIGNAL, SIGNAL]).problems == ["a sequence of 1 became one of 2"]
    assert distance([SIGNAL], SIGNAL).problems
    assert distance(SIGNAL, None).problems
    assert distance(None, None).equal
    assert distance([SIGNAL, SIGNAL], [SIGNAL, SIGNAL]).elements == 80


def test_top1_counts_rows_of_classifiers_only() -> None:
    swapped = SIGNAL.copy()
    swapped[0, SIGNAL[0].argmin()] = SIGNAL[0].max() + 1
    assert distance(SIGNAL, swapped).top1 == 0.75
    assert distance(SIGNAL.reshape(2, 2, 10), swapped.reshape(2, 2, 10)).top1 == 0.75
    assert distance(SIGNAL.reshape(1, 2, 2, 10), swapped.reshape(1, 2, 2, 10)).top1 is None
    assert distance(SIGNAL[:, :1], SIGNAL[:, :1]).top1 is None


def test_large_outputs_are_summed_in_parts() -> None:
    before = np.ones((1 << 20) + 7, np.float32)
    after = before.copy()
    after[-1] = 2
    assert distance(before, after).sqnr == pytest.approx(10 * math.log10(before.size))
