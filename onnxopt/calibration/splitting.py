"""Which samples calibrate and which are held out to judge by, told by their content alone; a few of many."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from onnxopt.data import Feeds, Samples

__all__ = ["digest_of", "split", "spread"]


def digest_of(sample: Feeds) -> str:
    """SHA-256 of names, types, shapes and elements."""
    digest = hashlib.sha256()
    for name in sorted(sample):
        array = np.asarray(sample[name])
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.hexdigest()


def split(samples: Sequence[Feeds], *, held_out: float = 0.3) -> tuple[Sequence[Feeds], Sequence[Feeds]]:
    """Samples for calibration, and those held out: about that share, and at least one of each.

    A sample goes where the hash of its content says, so that neither the order of the samples nor what else
    is among them matters; equal ones go together. One sample, or several equal ones, serve as both.
    """
    shares = [int(digest_of(samples[index])[:16], 16) / 2**64 for index in range(len(samples))]
    lowest, highest = min(shares, default=0.0), max(shares, default=0.0)
    if lowest == highest:
        return samples, samples
    bound = min(max(held_out, np.nextafter(lowest, 1)), highest)  # shares below it are held out
    kept = [index for index, share in enumerate(shares) if share >= bound]
    out = [index for index, share in enumerate(shares) if share < bound]
    return _view(samples, kept), _view(samples, out)


def spread(samples: Sequence[Feeds], count: int) -> Sequence[Feeds]:
    """So many of the samples, or all if they are fewer: the first, and others at about equal distances."""
    few = min(count, len(samples))
    return _view(samples, [number * len(samples) // few for number in range(few)])


def _view(samples: Sequence[Feeds], indices: list[int]) -> Samples:
    return Samples(len(indices), lambda number: samples[indices[number]])
