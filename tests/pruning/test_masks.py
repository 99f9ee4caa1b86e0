"""Masks of one bit an element, in memory and in files."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.errors import UsageError
from onnxopt.pruning.masks import Mask, read_masks, write_masks


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_box_of_a_mask_is_that_of_the_array(shape: list[int], data: st.DataObject) -> None:
    kept = np.random.default_rng(len(shape)).random(shape) < 0.5
    mask = Mask.of(kept)
    np.testing.assert_array_equal(mask.array(), kept)
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append(slice(start, data.draw(st.integers(start + 1, size))))
    np.testing.assert_array_equal(mask.array(tuple(box)), kept[tuple(box)])
    assert mask.bits.nbytes == -(-kept.size // 8)


def test_masks_come_back_from_their_file_and_equal_ones_give_equal_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {"a/b:0": rng.random((3, 5, 2)) < 0.5, "../c": rng.random((7,)) < 0.5, "": np.ones((2, 2), bool)}
    write_masks(masks, tmp_path / "one.npz")
    write_masks(masks, tmp_path / "two.masks")
    back = read_masks(tmp_path / "one.npz")
    assert list(back) == list(masks)
    for name, mask in masks.items():
        assert back[name].dtype == bool
        np.testing.assert_array_equal(back[name], mask)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.masks").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.npz", "two.masks"]


def test_no_masks_are_masks(tmp_path: Path) -> None:
    write_masks({}, tmp_path / "none.npz")
    assert read_masks(tmp_path / "none.npz") == {}


def test_what_is_no_file_of_masks_is_refused_in_one_line(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    write_masks({"w": np.ones((100, 10), bool)}, good)
    data = good.read_bytes()
    np.savez(tmp_path / "other.npz", w=np.ones(3))
    short: dict[str, Any] = {"names": ["w"], "0.bits": np.zeros(2, np.uint8), "0.shape": [100, 10]}
    np.savez(tmp_path / "short.npz", **short)
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.npz").write_text("no masks")
    for name in ("other", "short", "cut", "text"):
        with pytest.raises(UsageError, match="not a file of masks") as error:
            read_masks(tmp_path / f"{name}.npz")
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_masks(tmp_path / "missing.npz")
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        write_masks({}, tmp_path / "missing" / "masks.npz")


@pytest.mark.parametrize("place", range(0, 700, 37))
def test_a_flipped_bit_is_refused_or_changes_no_shape(tmp_path: Path, place: int) -> None:
    good = tmp_path / "good.npz"
    write_masks({"w": np.random.default_rng(0).random((100, 10)) < 0.5}, good)
    data = bytearray(good.read_bytes())
    data[place % len(data)] ^= 0x10
    good.write_bytes(data)
    with contextlib.suppress(UsageError):  # whatever is wrong, there is no other error
        assert all(mask.dtype == bool for mask in read_masks(good).values())
