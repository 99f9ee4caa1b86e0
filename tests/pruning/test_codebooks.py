"""Few numbers that stand for all: k-means in one dimension."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.pruning.codebooks import codebook_of


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(2, 16), st.floats(0, 0.9), st.integers(0, 99))
def test_each_element_has_the_nearest_number_and_each_number_is_a_mean(
    count: int, size: int, zeros: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_normal(count) * (rng.random(count) >= zeros)).astype(np.float32)
    book, codes = codebook_of(numbers, size)
    assert codes.dtype == np.uint8
    assert len(book) <= size
    shared = book[codes]
    assert ((shared == 0) == (numbers == 0)).all()
    left = book[int((numbers == 0).any()) :]
    assert (np.diff(left) > 0).all()
    some = numbers[numbers != 0]
    if len(some):
        nearest = np.abs(some[:, None] - left).min(1)
        np.testing.assert_allclose(np.abs(some - shared[numbers != 0]), nearest, rtol=1e-5, atol=1e-7)
    for code in np.unique(codes):
        np.testing.assert_allclose(numbers[codes == code].mean(dtype=np.float64), book[code], rtol=1e-5)


def test_few_different_elements_stay_as_they_are() -> None:
    numbers = np.array([[0.5, -2, 0], [-0.0, 0.5, 3]], np.float32)
    book, codes = codebook_of(numbers, 4)
    np.testing.assert_array_equal(book, [0, -2, 0.5, 3])
    np.testing.assert_array_equal(book[codes], numbers)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_one_number_is_its_own_codebook(value: float) -> None:
    book, codes = codebook_of(np.full((3, 2), value, np.float32), 8)
    assert book.tolist() == [value]
    assert not codes.any()


def test_five_bits_of_normal_numbers_are_close_to_the_best_quantizer() -> None:
    numbers = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    book, codes = codebook_of(numbers, 32)
    error = np.square(book[codes] - numbers).mean()
    assert error < 1.2 * 0.002499  # Max, "Quantizing for Minimum Distortion", 1960: 32 levels
