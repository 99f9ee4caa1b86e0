"""Sources, batches and transforms: what is read, in which order; chance depends on the seed alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onnxopt.data.contract import Contract, contract_of
from onnxopt.errors import UsageError
from onnxopt.model import load
from onnxopt.training.samples.sizes import Sizes, parse_sizes
from onnxopt.training.samples.sources import Stream, Table, open_source
from onnxopt.training.samples.transforms import parse_transforms
from onnxopt.training.schedules import parse_schedule
from tests.support import text_model
from tests.training.support import dataset, line_data

X = np.arange(20, dtype=np.float64).reshape(10, 2)
Y = np.arange(10)


def contract(shape: str, dtype: str = "double") -> Contract:
    text = f"agraph ({dtype}[{shape}] x) => ({dtype}[{shape}] z) {{ z = Identity(x) }}"
    return contract_of(load(text_model(text)))


PAIR = contract("n, 2")


def sizes(text: str, schedule: str = "constant") -> Sizes:
    return parse_sizes(text, parse_schedule(schedule), seed=0)


def npz(folder: Path) -> Any:
    np.savez(folder / "d.npz", x=X, y=Y)
    return folder / "d.npz"


def packed(folder: Path) -> Any:
    np.savez_compressed(folder / "d.npz", x=X, y=Y)
    return str(folder / "d.npz")


def npy(folder: Path) -> Any:
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)
    return folder


def files(folder: Path) -> Any:
    for number, (x, y) in enumerate(zip(X, Y, strict=True)):
        np.savez(folder / f"{number}.npz", x=x[None], y=y)
    return folder


def table(folder: Path) -> Any:
    rows = [f"{a},{y},{b}" for (a, b), y in zip(X, Y, strict=True)]
    (folder / "d.csv").write_text("\n".join(["a,y,b", *rows]) + "\n")
    return folder / "d.csv"


def function(folder: Path) -> Any:
    code = "import numpy as np\ndef gives():\n    x = np.arange(20.).reshape(10, 2)\n"
    (folder / "d.py").write_text(
        code + "    for i in range(0, 10, 4): yield x[i:i+4], np.arange(10)[i:i+4]\n"
    )
    return f"{folder / 'd.py'}:gives"


def loader(folder: Path) -> Any:
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(pairs, batch_size=3)


def mapping(folder: Path) -> Any:
    return {"x": X, "y": Y}


SOURCES = [npz, packed, npy, files, table, function, loader, mapping]


@pytest.mark.parametrize("make", SOURCES)
def test_every_source_gives_the_same_samples(make: Callable[[Path], Any], tmp_path: Path) -> None:
    shape = contract("n, 2", "float") if make is table else PAIR
    data = dataset(make(tmp_path), shape, labels=("y",))
    read = [batch.arrays for batch in data.evaluated(4)]
    np.testing.assert_array_equal(np.concatenate([one["x"] for one in read]), X)
    np.testing.assert_array_equal(np.concatenate([one["y"] for one in read]), Y)
    seen = [(n, b[0].arrays["y"].tolist()) for n, b in data.batches(sizes("4"), 0, 1)]
    assert sorted(y for _, some in seen for y in some) == Y.tolist()
    assert [n for n, _ in seen] == [4, 4, 2]
    assert (data.length is None) == isinstance(data.source, Stream)


def test_arrays_that_are_not_compressed_stay_on_the_disk(tmp_path: Path) -> None:
    source = open_source(npz(tmp_path), labels=["y"])
    assert isinstance(source, Table)
    found = inspect.getclosurevars(source.rows).nonlocals["arrays"]
    assert [type(one) for one in found.values()] == [np.memmap, np.memmap]


def test_a_dataset_of_hugging_face_is_read_by_its_columns() -> None:
    class Columns:  # what onnxopt uses of `datasets.Dataset`
        def with_format(self, kind: str) -> Columns:
            assert kind == "numpy"
            return self

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: list[int]) -> dict[str, np.ndarray]:
            return {"x": X[index], "y": Y[index]}

    read = next(dataset(Columns(), PAIR, labels=("y",)).evaluated(10)).arrays
    np.testing.assert_array_equal(read["x"], X)


def test_folders_of_images_are_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    for kind, shade in (("b_dark", 10), ("c_light", 250)):
        (tmp_path / kind).mkdir()
        image.new("L", (3, 2), shade).save(tmp_path / kind / "0.png")
    shape = contract("n, 1, 2, 3", "float")
    with pytest.raises(UsageError, match="images need their preprocessing stated"):
        dataset(tmp_path, shape, labels=("y",))
    (tmp_path / "preprocess.toml").write_text('order = "gray"\n')
    read = next(dataset(tmp_path, shape, labels=("y",)).evaluated(8)).arrays
    assert read["y"].tolist() == [0, 1]
    assert read["x"].shape == (2, 1, 2, 3)
    assert read["x"][:, 0, 0, 0].tolist() == [10, 250]


def test_the_order_is_of_the_seed_and_the_epoch_and_a_start_skips() -> None:
    data = dataset({"x": X, "y": Y}, PAIR, labels=("y",), workers=2)

    def order(epoch: int, **options: Any) -> list[int]:
        batches = data.batches(sizes("3"), epoch, 2, **options)
        return [int(y) for _, pieces in batches for one in pieces for y in one.arrays["y"]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(1, start=2) == order(1)[6:]
    both = [list(data.batches(sizes("3"), 0, 1, part=(rank, 2), pieces=2)) for rank in range(2)]
    found = [one for step in zip(*both, strict=True) for _, some in step for one in some]
    assert [int(y) for one in found if one.size for y in one.arrays["y"]] == order(0)
    assert [one.size for one in found][-2:] == [1, 0]  # the second process has nothing to count in the last


@pytest.mark.parametrize(("count", "pieces"), [(5, 4), (3, 2), (1, 3), (7, 1)])
def test_all_processes_have_as_many_pieces(count: int, pieces: int) -> None:
    """Weights in parts are put together in each piece, by all processes."""
    data = dataset({"x": X, "y": Y}, PAIR, labels=("y",), workers=0)
    parts = [
        [
            [one.size for one in some]
            for _, some in data.batches(sizes(str(count)), 0, 1, part=(rank, 3), pieces=pieces)
        ]
        for rank in range(3)
    ]
    assert all(len({len(some) for some in step}) == 1 for step in zip(*parts, strict=True))
    assert sum(size for steps in parts for some in steps for size in some) == len(X)


def test_sizes_are_fixed_random_grown_or_full() -> None:
    def of(text: str, schedule: str = "constant", epoch: int = 0) -> list[int]:
        return list(sizes(text, schedule).of_epoch(epoch, 4, 20))

    assert of("8") == [8, 8, 4]
    assert of("full") == [20]
    assert of("1") == [1] * 20
    assert [of("2", "exponential{gamma=2}", epoch)[0] for epoch in range(4)] == [2, 4, 8, 16]
    assert of("2-5") == of("2-5")
    assert set(of("2-5")[:-1]) <= {2, 3, 4, 5}
    assert sum(of("2-5")) == 20
    for text in ("0", "x", "5-2", "-3", "4-"):
        with pytest.raises(UsageError, match="expected a number, a range such as 16-64, or full"):
            sizes(text)


def test_a_share_is_held_out() -> None:
    first, second = dataset({"x": X, "y": Y}, PAIR, labels=("y",)).split(0.3)
    assert second is not None
    parts = [next(one.evaluated(10)).arrays["y"].tolist() for one in (first, second)]
    assert [len(one) for one in parts] == [7, 3]
    assert sorted([*parts[0], *parts[1]]) == Y.tolist()
    with pytest.raises(UsageError, match=r"holdout 0.99: of 10 samples some have to be left"):
        first.__class__(first.source, PAIR, ("y",)).split(0.99)


def images(count: int = 6) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(count, 2, 5, 5)), "y": np.arange(count)}


def test_transforms_are_random_in_training_alone_and_normalize_always() -> None:
    make = functools.partial(dataset, images(), contract("n, 2, 5, 5"), labels=("y",), seed=3)
    spelled = ("normalize{mean=1+2,std=0.5+4}", "shift{by=1}", "noise{std=0.1}", "flip", "gain", "erase")
    data = make(transforms=spelled)
    mean, std = np.array([[1.0, 2.0], [0.5, 4.0]])[:, None, :, None, None]
    plain = (images()["x"] - mean) / std
    np.testing.assert_allclose(next(data.evaluated(6)).arrays["x"], plain)
    np.testing.assert_allclose(data.samples()[2]["x"], plain[2:3])

    def epoch(one: Any, number: int, size: str) -> np.ndarray:
        pieces = [batch for _, some in one.batches(sizes(size), number, 2) for batch in some]
        order = np.concatenate([batch.arrays["y"] for batch in pieces]).argsort()
        return np.concatenate([batch.arrays["x"] for batch in pieces])[order]

    np.testing.assert_array_equal(epoch(data, 0, "2"), epoch(make(transforms=spelled), 0, "5"))
    assert not np.allclose(epoch(data, 0, "2"), epoch(data, 1, "2"))
    assert not np.allclose(epoch(data, 0, "6"), plain)


def test_what_each_transform_does() -> None:
    x = np.arange(18.0).reshape(2, 3, 3)

    def found(spelled: str) -> list[np.ndarray]:
        one = parse_transforms([spelled])[0]
        return [one(x, np.random.default_rng(seed)) for seed in range(40)]

    def matches(spelled: str, options: list[np.ndarray]) -> bool:
        seen = {array.tobytes() for array in found(spelled)}
        return seen == {np.ascontiguousarray(one).tobytes() for one in options}

    assert matches("flip{axis=1}", [x, x[:, ::-1]])
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)), constant_values=7)
    assert matches("shift{axes=1,fill=7}", [padded[:, i : i + 3] for i in range(3)])
    assert matches("crop{size=2,axes=-1}", [x[..., :2], x[..., 1:]])
    crop = parse_transforms(["crop{size=1}"])[0]
    np.testing.assert_array_equal(crop(x, None), x[:, 1:2, 1:2])
    gains = [array[1] / x[1] for array in found("gain{low=2,high=3}")]
    assert all(2 < gain.max() < 3 and np.ptp(gain) < 1e-12 for gain in gains)
    assert np.std([array - x for array in found("noise{std=3}")]) == pytest.approx(3, rel=0.1)
    erased = [(array == -1).sum() for array in found("erase{size=2,fill=-1}")]
    assert set(erased) == {2, 4, 8}
    with pytest.raises(UsageError, match="cannot cut 9 out of 3"):
        parse_transforms(["crop{size=9}"])[0](x, None)
    with pytest.raises(UsageError, match=r"unknown transform 'flop' \(did you mean 'flip'\?\)"):
        parse_transforms(["flop"])


STATE = "agraph (float[1, 4] x, float[2, 1, 3] h) => (float[1, 4] y) { y = Identity(x) }"


@pytest.mark.parametrize("kind", ["npz", "files", "stream"])
def test_feeds_with_a_state_are_samples_and_pieces_of_their_own(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 4), "h": (2, 1, 3), "y": (1, 4)}
    feeds = [{name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(5)]
    if kind == "files":
        for number, feed in enumerate(feeds):
            np.savez(tmp_path / f"{number}.npz", **feed)  # type: ignore[arg-type]
    if kind == "npz":
        np.savez(tmp_path / "all.npz", **{name: np.stack([one[name] for one in feeds]) for name in shapes})  # type: ignore[arg-type]
    source = {"npz": tmp_path / "all.npz", "files": tmp_path, "stream": lambda: feeds}[kind]
    data = dataset(source, contract_of(load(text_model(STATE))), labels=("y",))
    assert not data.stacks
    (_, pieces), (size, rest) = data.batches(sizes("3"), 0, 1)
    assert (len(pieces), size, len(rest)) == (3, 2, 2)
    assert {one.arrays["h"].shape for one in pieces} == {(2, 1, 3)}
    for one, feed in zip(data.evaluated(64), feeds, strict=True):
        np.testing.assert_array_equal(one.arrays["h"], feed["h"])
        np.testing.assert_array_equal(one.arrays["y"].ravel(), feed["y"].ravel())


def test_sizes_that_differ_make_batches_of_their_own(tmp_path: Path) -> None:
    rows = [np.full((1, length), length, np.float64) for length in (2, 2, 3, 3, 3, 2)]
    data = dataset(lambda: [{"x": row, "t": row[:, 0]} for row in rows], contract("n, t"))
    assert [one.arrays["x"].shape for one in data.evaluated(2)] == [(2, 2), (2, 3), (1, 3), (1, 2)]
    for number, row in enumerate(rows):
        np.savez(tmp_path / f"{number}.npz", x=row, t=row[:, 0])
    data = dataset(tmp_path, contract("n, t"))
    with pytest.raises(UsageError, match="samples that differ need batch_size=1"):
        list(data.batches(sizes("4"), 0, 1))
    assert len(list(data.batches(sizes("1"), 0, 1))) == 6
    assert [one.arrays["x"].shape for one in data.evaluated(2)] == [(2, 2), (2, 3), (1, 3), (1, 2)]


def test_pixels_of_8_bits_become_floats_where_a_transform_says_what_they_mean() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(2, 2, 3, 4)
    make = functools.partial(
        dataset, {"x": pixels, "y": [0, 1]}, contract("n, 2, 3, 4", "float"), labels=("y",)
    )
    read = next(make(transforms=("normalize{std=255}",)).evaluated(2)).arrays["x"]
    np.testing.assert_array_equal(read, pixels.astype(np.float32) / np.float32(255))
    with pytest.raises(UsageError, match="input 'x' takes float32, found uint8; convert it"):
        next(make().evaluated(2))


def test_a_number_that_comes_with_each_sample_is_one_for_all() -> None:
    text = "agraph (double[n, 2] x, double c) => (double[n, 2] y) { y = Mul(x, c) }"
    make = functools.partial(dataset, contract=contract_of(load(text_model(text))), labels=())
    assert next(make({"x": X, "c": np.full(10, 3.0)}).evaluated(4)).arrays["c"].shape == ()
    with pytest.raises(UsageError, match="input 'c'"):
        next(make({"x": X, "c": X[:, 0]}).evaluated(4))


def test_a_sample_axis_in_front_of_complete_feeds_is_taken_off() -> None:
    data = dataset({"x": X[:, None], "y": Y}, PAIR, labels=("y",))
    np.testing.assert_array_equal(next(data.evaluated(10)).arrays["x"], X)


def bad_rows() -> Iterator[Any]:
    yield 3


def fails() -> Iterator[Any]:
    raise KeyError("disk")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere.npz", "no such file or folder"),
        ({"x": X, "y": Y[:3]}, "the arrays differ in their number of samples: 'x' 10, 'y' 3"),
        ({"x": X[:0], "y": Y[:0]}, "holds no samples"),
        ({"x": X}, r"no array for label 'y' \(known: x\)"),
        ({"y": Y}, "no array for input 'x'"),
        ({"x": X[:, :1], "y": Y}, "input 'x' is declared as samples x 2, found 10 x 1"),
        ({"x": X.astype(np.int8), "y": Y}, "input 'x' takes float64, found int8"),
        (iter([]), "an iterator can be read once only"),
        (7, "a int gives no samples"),
        (bad_rows, r"gives a int; expected a dict of arrays, or \(inputs, labels\)"),
        (fails, "it failed to give samples: KeyError: 'disk'"),
    ],
)
def test_what_cannot_be_used_is_told(source: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        next(dataset(source, PAIR, labels=("y",)).evaluated(10))


def test_files_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK no")
    (tmp_path / "b.csv").write_text("x,y\n1,two\n")
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    (tmp_path / "e").mkdir()
    (tmp_path / "f.txt").write_text("")
    for name, told in {
        "a.npz": "not a readable .npz",
        "b.csv": "expected a line of names, then numbers",
        "c.csv": "there is no column 'z'",
        "e": "holds no .npz, no .npy and no folders of images",
        "f.txt": "is neither a folder nor .npz nor .csv",
        "hf:nope:train": "needs Hugging Face datasets",
    }.items():
        if name.startswith("hf:") and _installed("datasets"):
            continue
        with pytest.raises(UsageError, match=told):
            open_source(name if name.startswith("hf:") else tmp_path / name, labels=["z"])
    with pytest.raises(UsageError, match="a stream cannot be split"):
        dataset(bad_rows).split(0.1)
    with pytest.raises(UsageError, match="a stream has no length"):
        dataset(bad_rows).steps(sizes("full"), 1)
    assert dataset(line_data()).steps(sizes("5"), 3) == 9


def _installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
