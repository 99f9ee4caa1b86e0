"""Statistics as a file: one .npz, without pickle, written whole or not at all."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from onnxopt.calibration.histogram import BINS, Histogram
from onnxopt.calibration.tensors import ChannelStatistics, TensorStatistics
from onnxopt.errors import UsageError
from onnxopt.storage import staging

__all__ = ["read_tensors", "write_tensors"]

_VERSION = 1
_SUM_BYTES = 80
"""Of an exact sum: squares of float32 in units of 2^-298, 2^80 of them."""
_SCALARS = tuple(one.name for one in fields(Histogram) if one.name != "counts")
_UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def write_tensors(
    path: Path, statistics: Mapping[str, TensorStatistics], state: str = "", done: int = 0
) -> None:
    """Write a file; `state` and `done` say how far a run is that goes on. Raises ModelError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = statistics.values()
    histograms = [histogram for one in tensors for histogram in (one.histogram, one.held_out)]
    places = [np.flatnonzero(histogram.counts) for histogram in histograms]
    counts = [h.counts.reshape(-1)[place] for h, place in zip(histograms, places, strict=True)]
    channels = [one.channel for one in tensors if one.channel is not None]
    header = {
        "version": _VERSION,
        "state": state,
        "done": done,
        "names": list(statistics),
        "samples": [[one.samples, hex(one.exact_minima), hex(one.exact_maxima)] for one in tensors],
        "histograms": [[getattr(histogram, name) for name in _SCALARS] for histogram in histograms],
        "filled": [len(place) for place in places],
        "channels": [
            None if one.channel is None else [one.channel.axis, len(one.channel.count)] for one in tensors
        ],
    }
    with staging(path) as folder:
        draft = folder / "statistics.npz"
        np.savez_compressed(
            draft,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            places=_joined(places, np.int32),
            counts=_joined(counts, np.int64),
            minimum=_joined([one.minimum for one in channels], np.float32),
            maximum=_joined([one.maximum for one in channels], np.float32),
            count=_joined([one.count for one in channels], np.int64),
            sums=_joined([_packed(one.exact_sum) for one in channels], np.uint8),
            squares=_joined([_packed(one.exact_squares) for one in channels], np.uint8),
        )
        os.replace(draft, path)


def read_tensors(path: Path) -> tuple[dict[str, TensorStatistics], str, int]:
    """What `write_tensors` wrote. Raises UsageError where that cannot be read."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays["header"].tobytes())
        if header["version"] != _VERSION:
            raise ValueError(f"it is of version {header['version']}")
        return _unpacked(header, arrays), header["state"], header["done"]
    except _UNREADABLE as error:
        raise UsageError(f"{path}: no calibration statistics, or cut off: {error}") from error


def _unpacked(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, TensorStatistics]:
    histograms = _histograms(header, arrays)
    first, tensors = 0, {}
    for name, seen, channel in zip(header["names"], header["samples"], header["channels"], strict=True):
        samples, minima, maxima = seen
        one = TensorStatistics(samples, int(minima, 16), int(maxima, 16), next(histograms), next(histograms))
        if channel is not None:
            axis, size = channel
            part = slice(first, first + size)
            ranges = [arrays[key][part] for key in ("minimum", "maximum", "count")]
            sums = [_exact(arrays[key].reshape(-1, _SUM_BYTES)[part]) for key in ("sums", "squares")]
            one.channel = ChannelStatistics(axis, *ranges, *sums)
            first += size
        tensors[name] = one
    return tensors


def _histograms(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Iterator[Histogram]:
    start = 0
    for scalars, filled in zip(header["histograms"], header["filled"], strict=True):
        counts = np.zeros(2 * BINS, np.int64)
        counts[arrays["places"][start : start + filled]] = arrays["counts"][start : start + filled]
        start += filled
        yield Histogram(**dict(zip(_SCALARS, scalars, strict=True)), counts=counts.reshape(2, BINS))


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)


def _packed(sums: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"".join(one.to_bytes(_SUM_BYTES, "little", signed=True) for one in sums), np.uint8)


def _exact(packed: np.ndarray) -> np.ndarray:
    sums = np.empty(len(packed), object)
    sums[:] = [int.from_bytes(row.tobytes(), "little", signed=True) for row in packed]
    return sums
