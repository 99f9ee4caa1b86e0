"""Tensors computed box by box: the same elements as numpy gives, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.scale import transposed_model
from onnxopt import boxes, streamed
from onnxopt.errors import ModelError
from onnxopt.graph import tensors
from onnxopt.model import load
from onnxopt.streamed import (
    Streamed,
    concatenated,
    cropped,
    mapped,
    pieces,
    read,
    reshaped,
    sample,
    sources,
    taken,
    transposed,
)

DTYPES = ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "INT64", "BOOL", "UINT16", "FLOAT8E4M3FN"]
Pair = tuple[ir.TensorProtocol, np.ndarray]


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def stored(path: Path, shape: tuple[int, ...], dtype: str = "FLOAT", seed: int = 0) -> Pair:
    """A tensor in a file, behind some other bytes, and its elements."""
    kind = ir.DataType[dtype]
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(kind.numpy())
    path.write_bytes(b"head" + bits(array))
    return ir.ExternalTensor(path, 4, array.nbytes, kind, shape=ir.Shape(shape), name="w"), array


def shapes(most: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, most), min_size=1, max_size=4).map(tuple)


def regrouped(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A shape of so many elements."""
    shape = []
    while size > 1:
        divisor = draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0]))
        shape.append(divisor)
        size //= divisor
    return tuple(shape)


def a_slice(draw: st.DrawFn, size: int) -> slice:
    step = draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
    first = draw(st.integers(0, size - 1))
    if step > 0:
        return slice(first, draw(st.integers(first + 1, size + 1)), step)
    last = draw(st.integers(-1, first - 1))
    return slice(first, None if last < 0 else last, step)


def changed(draw: st.DrawFn, pair: Pair) -> Pair:
    """One operation on a tensor and on its elements."""
    tensor, array = pair
    kind = draw(st.sampled_from(["transpose", "crop", "concat", "take", "map", "reshape"]))
    axis = draw(st.integers(0, array.ndim - 1)) if array.ndim else 0
    if kind == "reshape" or not array.ndim:
        shape = regrouped(draw, array.size)
        return reshaped(tensor, shape), array.reshape(shape)
    if kind == "transpose":
        perm = draw(st.permutations(range(array.ndim)))
        return transposed(tensor, perm), array.transpose(perm)
    if kind == "crop":
        spans = tuple(a_slice(draw, size) for size in array.shape)
        return cropped(tensor, spans), array[spans]
    if kind == "concat":
        other = np.flip(array, axis)
        return concatenated([tensor, ir.Tensor(other.copy()), tensor], axis), np.concatenate(
            [array, other, array], axis
        )
    if kind == "take":
        size = array.shape[axis]
        numbers = draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4))
        indices = np.array(numbers).reshape(draw(st.sampled_from([(-1,), (1, -1)])))
        return taken(tensor, indices, axis), np.take(array, indices, axis)
    row = np.arange(array.shape[-1]).astype(array.dtype)

    def larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray(np.maximum(x, y))

    return mapped(larger, [tensor, ir.Tensor(row)], tensor.dtype), np.maximum(array, row)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_chains_of_operations_give_what_numpy_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("chain") / "w"
    draw = data.draw
    pair = stored(path, draw(shapes()), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    span, gap, piece = (draw(st.sampled_from([16, 100, 1 << 20])) for _ in range(3))
    for _ in range(draw(st.integers(1, 4))):
        if pair[1].size > 1000:
            break
        pair = changed(draw, pair)  # type: ignore[arg-type]  # data.draw is such a function
    tensor, array = pair
    with mock.patch.multiple(boxes, _SPAN=span, _GAP=gap), mock.patch.object(streamed, "_PIECE", piece):
        assert tuple(tensor.shape.numpy()) == array.shape
        assert tensor.numpy().dtype == array.dtype
        assert bits(tensor.numpy()) == bits(array)
        size = draw(st.sampled_from([8, 100, 1 << 20]))
        assert b"".join(pieces(tensor, size)) == bits(array)
        box = []
        for length in array.shape:
            start = draw(st.integers(0, length - 1))
            box.append(slice(start, draw(st.integers(start + 1, length))))
        assert bits(read(tensor, tuple(box))) == bits(array[tuple(box)])
    assert sources(tensor) == frozenset([path.resolve()])


def test_what_only_lies_elsewhere_in_its_file_is_external_again(tmp_path: Path) -> None:
    tensor, array = stored(tmp_path / "w", (6, 4, 2))
    assert isinstance(tensor, ir.ExternalTensor)
    for moved, expected in (
        (reshaped(tensor, (8, 6)), array.reshape(8, 6)),
        (cropped(tensor, (slice(2, 5), slice(None), slice(None))), array[2:5]),
        (cropped(tensor, (slice(2, 3), slice(1, 3), slice(0, 2))), array[2:3, 1:3]),
    ):
        assert isinstance(moved, ir.ExternalTensor)
        assert bits(moved.numpy()) == bits(expected)
    part = cropped(tensor, (slice(None), slice(1, 3), slice(None)))
    assert isinstance(part, Streamed)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: transposed(w, (1, 0)),
        lambda w: mapped(np.negative, [w], w.dtype),
        lambda w: concatenated([w, w], 0),
        lambda w: w,
    ],
)
def test_a_file_that_ends_too_soon_is_named(
    change: Callable[[ir.TensorProtocol], ir.TensorProtocol], tmp_path: Path
) -> None:
    tensor, _ = stored(tmp_path / "w", (50, 60))
    with (tmp_path / "w").open("rb+") as file:
        file.truncate(100)
    with pytest.raises(ModelError, match=r"w: cut off while tensor 'w' was read"):
        list(pieces(change(tensor)))


def test_empty_tensors_have_no_bytes(tmp_path: Path) -> None:
    tensor, _ = stored(tmp_path / "w", (4, 5))
    empty = cropped(tensor, (slice(2, 2), slice(None)))
    assert list(pieces(empty)) == []
    assert empty.numpy().shape == (0, 5)
    assert transposed(empty, (1, 0)).numpy().shape == (5, 0)
    assert reshaped(empty, (5, 0)).numpy().shape == (5, 0)


def test_a_sample_tells_weights_apart_and_reads_little(tmp_path: Path) -> None:
    tensor, _ = stored(tmp_path / "w", (1 << 20,))
    again, _ = stored(tmp_path / "v", (1 << 20,))
    other, _ = stored(tmp_path / "u", (1 << 20,), seed=1)
    small, array = stored(tmp_path / "s", (100,))
    assert isinstance(tensor, ir.ExternalTensor)
    assert isinstance(again, ir.ExternalTensor)
    assert isinstance(other, ir.ExternalTensor)
    assert isinstance(small, ir.ExternalTensor)
    assert sample(tensor) == sample(again) != sample(other)
    assert len(sample(tensor)) == 1 << 16
    assert sample(small) == bits(array)


_SAVED = """
import json, resource, sys
import onnxopt, onnxopt.api
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
result = onnxopt.optimize(sys.argv[1], verify=False, bench=False)
before = peak()
result.save(sys.argv[2])
print(json.dumps([before, peak(), [node.op_type for node in result.graph.graph]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_a_folded_weight_is_never_in_memory_whole(tmp_path: Path) -> None:
    width = 7_000
    source = transposed_model(tmp_path, width, weights=1)
    target = tmp_path / "out.onnx"
    done = subprocess.run(
        [sys.executable, "-c", _SAVED, str(source), str(target)],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    before, after, op_types = json.loads(done.stdout)
    assert "Transpose" not in op_types
    assert after - before < width * width * 4 * 0.6
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert data.stat().st_size >= width * width * 4
    old, new = (
        tensor.numpy()
        for path in (source, target)
        for tensor in tensors(load(path))
        if tensor.nbytes == width * width * 4
    )
    rows = np.random.default_rng(0).integers(0, width, 50)
    np.testing.assert_array_equal(new[rows], old[:, rows].T)
    np.testing.assert_array_equal(new[:, :8], old[:8].T)
