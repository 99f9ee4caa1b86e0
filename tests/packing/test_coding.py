"""Each block comes back bit for bit, whatever its bits are; damaged ones are refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.packing.coding import Coded, decode, encode
from onnxopt.packing.entropy import expand, squeeze

KINDS = ("f2", "f4", "f8", "u1", "u2", "u4", "u8")
SPECIAL = (0x8000_0000, 0x7FC0_0001, 0xFFC0_0000, 0x7F80_0000, 1)
"""Minus zero, two NaNs with payloads, infinity, the smallest denormal."""


def pruned(share: float, bits: int = 0, size: int = 40_000) -> np.ndarray:
    """Normal float32, of which the smallest are zero and the others, with `bits`, one of so many values."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(size).astype(np.float32)
    if bits:
        book = np.quantile(weights, np.linspace(0, 1, 2**bits)).astype(np.float32)
        weights = book[np.abs(weights[:, None] - book).argmin(1)]
    weights[np.argsort(np.abs(weights), kind="stable")[: int(share * size)]] = 0
    return weights


def round_trip(data: bytes, kind: str) -> Coded:
    coded = encode(data, kind)
    assert decode(coded, kind, len(data)) == data
    assert sum(map(len, coded.streams)) <= sum(coded.sizes)
    return coded


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(0, 3000),
    share=st.sampled_from([0, 0.05, 0.5, 0.9, 0.999, 1]),
    distinct=st.sampled_from([1, 2, 30, 300, 10**6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_elements_come_back(kind: str, count: int, share: float, distinct: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    book = rng.integers(0, 256, (min(distinct, count + 1), int(kind[1])), np.uint8)
    elements = book[rng.integers(0, len(book), count)]
    elements[rng.random(count) < share] = book[0]
    round_trip(elements.tobytes(), kind)


@pytest.mark.parametrize("special", SPECIAL)
def test_zero_means_all_bits_zero(special: int) -> None:
    bits = pruned(0.9).view(np.uint32)
    bits[::7] = special
    coded = round_trip(bits.tobytes(), "f4")
    assert coded.coding.split("+")[0] in ("gaps", "mask")


@pytest.mark.parametrize(
    ("share", "bits", "how", "bound"),
    [
        # Bound: the entropy of the places, that of the values (24 bits of mantissa and sign), and 3 %.
        (0.0, 0, "dense+planes", 0.87),
        (0.8, 0, "planes", 0.20),
        (0.9, 0, "planes", 0.11),
        (0.9, 5, "codebook", 0.032),
        (0.99, 5, "gaps+codebook", 0.005),
    ],
)
def test_pruned_weights_take_what_their_entropy_is(share: float, bits: int, how: str, bound: float) -> None:
    weights = pruned(share, bits)
    coded = round_trip(weights.tobytes(), "f4")
    assert how in coded.coding
    assert sum(map(len, coded.streams)) <= bound * weights.nbytes


def test_the_most_frequent_element_need_not_be_zero() -> None:
    """Indices of a codebook, in which the weight 0 has index 13."""
    indices = np.full(40_000, 13, np.uint8)
    indices[pruned(0.9) != 0] = np.random.default_rng(1).integers(0, 32, 4000)
    coded = round_trip(indices.tobytes(), "u1")
    assert coded.coding in ("gaps+bytes", "mask+bytes")
    assert sum(map(len, coded.streams)) <= 0.13 * len(indices)


def test_two_of_four_is_coded_by_a_mask() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((10_000, 4)).astype(np.float32)
    np.put_along_axis(weights, np.argsort(np.abs(weights), axis=1)[:, :2], 0, axis=1)
    assert round_trip(weights.tobytes(), "f4").coding == "mask+planes"


def test_long_gaps_take_escapes() -> None:
    values = np.zeros(1_000_000, np.float32)
    rng = np.random.default_rng(0)
    places = [254, 255, 511, 766, 999_999, *rng.choice(900_000, 600) + 1000]
    values[places] = rng.standard_normal(len(places))
    assert round_trip(values.tobytes(), "f4").coding.startswith("gaps+")


def test_noise_grows_by_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8)
    assert squeeze(noise) == noise.tobytes()


BLOCK = np.arange(8, dtype=np.uint32).tobytes()


@pytest.mark.parametrize(
    ("coding", "streams"),
    [
        ("dense+bytes", [BLOCK[:-1]]),
        ("dense+bytes", []),
        ("dense+planes", [bytes(8)] * 3),
        ("dense+planes", [bytes(7)] * 4),
        ("dense+codebook", [bytes(4)]),
        ("dense+codebook", [bytes(4), bytes(7)]),
        ("dense+codebook", [bytes(4), bytes([0] * 7 + [1])]),
        ("dense+codebook", [b"", bytes(8)]),
        ("dense+codebook", [bytes(4), bytes(8), bytes([1] * 8)]),
        ("mask+bytes", [bytes(4)]),
        ("mask+bytes", [bytes(3), bytes(1)]),
        ("mask+bytes", [bytes(4), bytes(2), b""]),
        ("mask+bytes", [bytes(4), b"\x80", b""]),
        ("gaps+bytes", [bytes(4), bytes([7, 0]), bytes(8)]),
        ("gaps+bytes", [bytes(4), bytes([255] * 9 + [0]), bytes(4)]),
    ],
)
def test_streams_that_do_not_fit_are_refused(coding: str, streams: list[bytes]) -> None:
    coded = Coded(coding, tuple(map(len, streams)), tuple(streams))
    with pytest.raises(ValueError, match="do not fit each other"):
        decode(coded, "u4", len(BLOCK))


@pytest.mark.parametrize("coding", ["dense", "dense+huffman", "runs+bytes", "", "dense+bytes+bytes"])
def test_a_coding_that_is_not_known_is_refused(coding: str) -> None:
    with pytest.raises(ValueError, match="a newer onnxopt may read it"):
        decode(Coded(coding, (len(BLOCK),), (BLOCK,)), "u4", len(BLOCK))


def test_nothing_larger_than_declared_is_ever_expanded() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(ValueError, match="another size than declared"):
        expand(bomb, 1 << 10)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 24))
    with pytest.raises(ValueError, match="another size than declared"):
        expand(silent, 1 << 10)
    with pytest.raises(ValueError, match="cannot be read"):
        expand(b"no zstandard", 1 << 10)
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 10))
    with pytest.raises(ValueError, match="cannot be read"):
        expand(frame + frame, 1 << 10)
    with pytest.raises(ValueError, match="cannot be read"):
        expand(frame[:-1], 1 << 10)


def test_the_same_block_gives_the_same_bytes() -> None:
    data = pruned(0.9, 5).tobytes()
    codes = {zlib.crc32(b"".join(encode(data, "f4").streams)) for _ in range(2)}
    assert len(codes) == 1
