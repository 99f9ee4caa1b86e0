"""Which elements of weights are kept: one bit for each, in memory and in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxopt.boxes import Box, gathered
from onnxopt.errors import UsageError, one_line

__all__ = ["Mask", "read_masks", "write_masks"]


@dataclass(frozen=True)
class Mask:
    """The kept elements of one weight.

    bits: uint8, eight elements a byte, the first one in the highest bit. shape: of the weight.
    """

    bits: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def of(cls, kept: np.ndarray) -> Mask:
        """From a bool array of the weight's shape, True where an element is kept."""
        return cls(np.packbits(kept.reshape(-1)), kept.shape)

    def array(self, box: Box | None = None) -> np.ndarray:
        """The mask as a bool array, or a box of it."""
        whole = tuple(slice(0, size) for size in self.shape) if box is None else box
        return gathered(np.dtype(bool), self.shape, whole, self._fill)

    def _fill(self, first: int, run: np.ndarray) -> None:
        start, skipped = divmod(first, 8)
        bits = self.bits[start : -(-(first + len(run)) // 8)]
        run[...] = np.unpackbits(bits)[skipped : skipped + len(run)]


def write_masks(masks: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Write masks (name of a weight -> bool array, True: kept) as one .npz of packed bits.

    Each has two entries, `<number>.bits` and `<number>.shape`; `names` lists the weights. Equal masks give
    equal bytes.
    """
    entries: dict[str, np.ndarray] = {"names": np.array(list(masks), np.str_)}
    for number, mask in enumerate(masks.values()):
        entries[f"{number}.bits"] = np.packbits(np.asarray(mask, bool).reshape(-1))
        entries[f"{number}.shape"] = np.array(mask.shape, np.int64)
    new = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as file:
            np.savez_compressed(file, **entries)  # type: ignore[arg-type]  # names of entries are no options
        os.replace(new, path)
    except OSError as error:
        raise UsageError(f"masks {path}: cannot be written: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


def read_masks(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The masks of a file that `write_masks` wrote. Raises UsageError where it is none."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {
                str(name): _unpacked(file[f"{number}.bits"], file[f"{number}.shape"])
                for number, name in enumerate(file["names"])
            }
    except OSError as error:
        raise UsageError(f"masks {path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # archives that are broken fail in many ways
        raise UsageError(f"masks {path}: not a file of masks: {one_line(error)}") from error


def _unpacked(bits: np.ndarray, shape: np.ndarray) -> np.ndarray:
    sizes = tuple(int(size) for size in shape)
    count = int(np.prod(sizes))
    if bits.dtype != np.uint8 or min(sizes, default=0) < 0 or len(bits) != -(-count // 8):
        raise ValueError(f"{len(bits)} bytes for the shape {list(sizes)}")
    return np.unpackbits(bits, count=count).astype(bool).reshape(sizes)
