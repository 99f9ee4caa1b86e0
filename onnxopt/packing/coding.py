"""A block of elements as streams of bytes, each of one sort, and back, bit for bit.

A coding is two words, `where+how`. Where: which elements are not the most frequent one, usually zero.

    dense     all elements are coded, there is no most frequent one
    gaps      of the others, how many elements lie before each; 255 and more in steps of 255
    mask      one bit for each element

How: the elements themselves, or the others.

    bytes     as they are
    planes    the first bytes of all, the second bytes of all, ...; floats with the sign moved to the low end,
              so that the exponent is in a plane of its own
    codebook  each different element once, then the index of each, in one plane or two

Sparse gaps and codebooks are those of Han et al., "Deep Compression" (https://arxiv.org/abs/1510.00149).
Elements are bit patterns here: minus zero is not zero, and a NaN is like any other element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxopt.packing.entropy import estimate, expand, squeeze

__all__ = ["Coded", "decode", "encode"]

_ESCAPE = 255
_LARGEST_BOOK = 1 << 16
_SAMPLE = 1 << 14
_OFTEN = 1 / 16
_OFTEN_BYTE = 1 / 2
"""Share of the most frequent element from which on it is left out; a byte has a short code anyway."""

Streams = list[np.ndarray]


@dataclass(frozen=True)
class Coded:
    """A block as it is stored: its coding, and each stream with its size before it was made smaller."""

    coding: str
    sizes: tuple[int, ...]
    streams: tuple[bytes, ...]


def encode(data: bytes | memoryview, kind: str) -> Coded:
    """The block in the coding that is likely the smallest; bytes as they are stand for the choice always.

    kind: `f` or `u` and the bytes of an element, of which the block holds a whole number.
    """
    elements = np.frombuffer(data, _dtype(kind))
    best = min(_candidates(elements, kind), key=lambda found: sum(map(estimate, found[1])))
    coding, streams = best
    return Coded(coding, tuple(len(stream) for stream in streams), tuple(map(squeeze, streams)))


def decode(coded: Coded, kind: str, size: int) -> bytes:
    """The block of `size` bytes.

    Raises:
        ValueError: it is damaged, or its coding is not known.
    """
    where, _, how = coded.coding.partition("+")
    if how not in _VALUES or (where != "dense" and where not in _PLACES):
        raise ValueError(f"no coding {coded.coding!r} is known: a newer onnxopt may read it")
    dtype = _dtype(kind)
    _expect(size % dtype.itemsize == 0)
    count = size // dtype.itemsize
    streams = [
        np.frombuffer(expand(code, raw), np.uint8)
        for code, raw in zip(coded.streams, coded.sizes, strict=True)
    ]
    read = _VALUES[how][1]
    if where == "dense":
        return read(streams, dtype, kind, count).tobytes()
    _expect(len(streams) >= 2 and len(streams[0]) == dtype.itemsize)
    places = _PLACES[where][1](streams[1], count)
    elements = np.full(count, streams[0].view(dtype)[0])
    elements[places] = read(streams[2:], dtype, kind, len(places))
    return elements.tobytes()


def _candidates(elements: np.ndarray, kind: str) -> Iterator[tuple[str, Streams]]:
    splits: list[tuple[str, Streams, np.ndarray]] = [("dense", [], elements)]
    common = _most_frequent(elements)
    others = elements != common
    least = _OFTEN_BYTE if elements.itemsize == 1 else _OFTEN
    if np.count_nonzero(others) <= (1 - least) * len(elements):
        ways = [(where, write(others)) for where, (write, _) in _PLACES.items()]
        where, stream = min(ways, key=lambda way: estimate(way[1]))
        splits.append((where, [common.reshape(1).view(np.uint8), stream], elements[others]))
    for where, head, values in splits:
        for how, (write_values, _) in _VALUES.items():
            body = write_values(values, kind)
            if body is not None:
                yield f"{where}+{how}", head + body


def _most_frequent(elements: np.ndarray) -> np.ndarray:
    """The element that is likely the most frequent one, judged by a sample."""
    if not len(elements):
        return np.zeros((), elements.dtype)
    found, counts = np.unique(_sampled(elements), return_counts=True)
    return np.asarray(found[np.argmax(counts)])


def _sampled(elements: np.ndarray) -> np.ndarray:
    """Elements spread over all, at steps that are odd, since weights repeat in powers of two."""
    return elements[:: (len(elements) // _SAMPLE) | 1]


def _write_gaps(others: np.ndarray) -> np.ndarray:
    steps = np.diff(np.flatnonzero(others), prepend=-1) - 1
    escapes = steps // _ESCAPE
    stream = np.full(len(steps) + int(escapes.sum()), _ESCAPE, np.uint8)
    stream[np.cumsum(escapes + 1) - 1] = steps % _ESCAPE
    return stream


def _read_gaps(stream: np.ndarray, count: int) -> np.ndarray:
    steps = stream.astype(np.int64)
    ends = stream != _ESCAPE
    steps[ends] += 1
    places: np.ndarray = np.cumsum(steps)[ends] - 1
    _expect(not len(places) or int(places[-1]) < count)
    return places


def _write_mask(others: np.ndarray) -> np.ndarray:
    return np.packbits(others)


def _read_mask(stream: np.ndarray, count: int) -> np.ndarray:
    _expect(len(stream) == (count + 7) // 8)
    return np.flatnonzero(np.unpackbits(stream, count=count))


def _write_bytes(values: np.ndarray, _kind: str) -> Streams:
    return [values.view(np.uint8)]


def _read_bytes(streams: Sequence[np.ndarray], dtype: np.dtype, _kind: str, count: int) -> np.ndarray:
    _expect(len(streams) == 1 and len(streams[0]) == count * dtype.itemsize)
    return streams[0].view(dtype)


def _write_planes(values: np.ndarray, kind: str) -> Streams | None:
    if values.itemsize == 1:
        return None
    if kind[0] == "f":
        values = (values << 1) | (values >> (8 * values.itemsize - 1))
    columns = values.view(np.uint8).reshape(-1, values.itemsize)
    return [np.ascontiguousarray(columns[:, plane]) for plane in range(values.itemsize)]


def _read_planes(streams: Sequence[np.ndarray], dtype: np.dtype, kind: str, count: int) -> np.ndarray:
    _expect(len(streams) == dtype.itemsize and all(len(stream) == count for stream in streams))
    values = np.stack(streams, axis=1).reshape(-1).view(dtype)
    return (values >> 1) | (values << (8 * dtype.itemsize - 1)) if kind[0] == "f" else values


def _write_codebook(values: np.ndarray, _kind: str) -> Streams | None:
    sample = _sampled(values)
    if values.itemsize == 1 or len(np.unique(sample)) > max(len(sample) // 2, 256):
        return None
    book, indices = np.unique(values, return_inverse=True)
    if len(book) > min(_LARGEST_BOOK, max(len(values), 1)):
        return None
    planes = [(indices & 0xFF).astype(np.uint8)]
    if len(book) > 256:
        planes.append((indices >> 8).astype(np.uint8))
    return [book.view(np.uint8), *planes]


def _read_codebook(streams: Sequence[np.ndarray], dtype: np.dtype, _kind: str, count: int) -> np.ndarray:
    _expect(len(streams) in (2, 3) and len(streams[0]) % dtype.itemsize == 0)
    _expect(all(len(stream) == count for stream in streams[1:]))
    book, indices = streams[0].view(dtype), streams[1].astype(np.uint16)
    if len(streams) == 3:
        indices |= streams[2].astype(np.uint16) << 8
    _expect(not count or int(indices.max()) < len(book))
    return book[indices]


def _dtype(kind: str) -> np.dtype:
    """Elements as unsigned integers of their bits, the low byte first as in ONNX."""
    return np.dtype(f"<u{kind[1:]}")


def _expect(holds: bool) -> None:
    if not holds:
        raise ValueError("the streams of a block do not fit each other")


_PLACES: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "gaps": (_write_gaps, _read_gaps),
    "mask": (_write_mask, _read_mask),
}
_VALUES: dict[str, tuple[Callable[..., Streams | None], Callable[..., np.ndarray]]] = {
    "bytes": (_write_bytes, _read_bytes),
    "planes": (_write_planes, _read_planes),
    "codebook": (_write_codebook, _read_codebook),
}
"""Each a way to write and a way to read."""
