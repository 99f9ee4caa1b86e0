"""Bytes made smaller: Zstandard, as a coder of symbols or of repetitions, whichever the bytes are made of.

Measured on real weights, at 90 % sparsity with codebooks of 5 bits, an order-0 ANS coder gains 1 to 2 %
over the Huffman codes of Zstandard, so there is no second library. What repeats nothing is coded at one
search step: within 0.2 % of level 19, over ten times as fast.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from types import ModuleType

import numpy as np

from onnxopt.errors import UsageError

__all__ = ["estimate", "expand", "squeeze", "zstandard"]

_SMALL = 1 << 16
"""Bytes that are worth both ways, whatever they look like."""
_HEAD = 16
"""Bytes of a stream that are not its symbols, about."""
_REPETITIVE = 0.9
"""Share of the entropy below which the quick coder must have found repetitions."""


def squeeze(data: np.ndarray) -> bytes:
    """The bytes coded, never longer: of the same length, they are as they were.

    data: uint8 of rank 1. The same bytes and the same library give the same code.

    Raises:
        UsageError: zstandard is not installed.
    """
    raw = data.tobytes()
    quick, entropy = _quick(raw), _entropy(data)
    if quick >= len(raw) and entropy > 0.995 * len(raw):
        return raw
    ways = [zstandard().ZstdCompressor(compression_params=_symbols())]
    if quick < _REPETITIVE * entropy or len(raw) <= _SMALL:
        ways.append(zstandard().ZstdCompressor(level=19))
    codes: list[bytes] = [raw, *(way.compress(raw) for way in ways)]
    return min(codes, key=len)


def estimate(data: np.ndarray) -> int:
    """About how many bytes `squeeze` gives, judged by four parts of what is large."""
    step = max(len(data) // 4, _SMALL)
    seen = np.concatenate([data[start : start + _SMALL] for start in range(0, max(len(data), 1), step)])
    share = len(data) / max(len(seen), 1)
    return int(min(_quick(seen.tobytes()), _huffman(seen)) * share) + _HEAD


def expand(code: bytes, size: int) -> bytes:
    """The bytes that `squeeze` was given.

    size: how many they are; nothing larger is ever allocated.

    Raises:
        ValueError: the code is damaged, or of another number of bytes.
    """
    if len(code) == size:
        return code
    library = zstandard()
    try:
        if library.get_frame_parameters(code).content_size != size:
            raise ValueError("a stream has another size than declared")
        data: bytes = library.ZstdDecompressor(max_window_size=1 << 27).decompress(
            code, max_output_size=size, allow_extra_data=False
        )
    except library.ZstdError as error:
        raise ValueError(f"a stream cannot be read: {error}") from None
    if len(data) != size:
        raise ValueError("a stream has another size than declared")
    return data


def _entropy(data: np.ndarray) -> float:
    """Bytes that an ideal coder of single symbols needs."""
    counts = np.bincount(data, minlength=256)
    counts = counts[counts > 0]
    return float(-np.sum(counts * np.log2(counts / max(len(data), 1)))) / 8


def _huffman(data: np.ndarray) -> int:
    """Bytes that Huffman's code needs: at least one bit a symbol, however frequent it is."""
    counts = np.bincount(data)
    weights = counts[counts > 0].tolist()
    heapq.heapify(weights)
    bits = 0
    while len(weights) > 1:
        merged = heapq.heappop(weights) + heapq.heappop(weights)
        heapq.heappush(weights, merged)
        bits += merged
    return bits // 8


def _quick(raw: bytes) -> int:
    return len(zstandard().ZstdCompressor(level=1).compress(raw))


@lru_cache(maxsize=1)
def _symbols() -> object:
    library = zstandard()
    return library.ZstdCompressionParameters(
        strategy=library.STRATEGY_BTULTRA,
        min_match=3,
        window_log=17,
        hash_log=12,
        chain_log=12,
        search_log=1,
        target_length=8,
    )


def zstandard() -> ModuleType:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import zstandard as library
    except ImportError:
        raise UsageError("pack: packs need zstandard: pip install 'onnxopt[pack]'") from None
    return library
