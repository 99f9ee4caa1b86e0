"""The user's samples: each form they come in, and one clear line for each way they can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxopt.data import parse_shape, python_target, read_feeds
from onnxopt.errors import UsageError

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 3, 4)).astype(np.float32)
IDS = np.arange(5)


@pytest.fixture
def two() -> onnx.ModelProto:
    """Inputs x: float32 [n, 3, 4] and id: int64 scalar; k: float32 [4] has a default."""
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 3, 4] x, int64 id, float[4] k) => (float[n, 3, 4] y)
        <float[4] k = {1, 2, 3, 4}> { y = Add(x, k) }"""
    )


@pytest.fixture
def one() -> onnx.ModelProto:
    """One input x: float32 [n, 3, 4]."""
    return onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n, 3, 4] x) => (float[n, 3, 4] y) { y = Relu(x) }"""
    )


def identity(kind: str) -> onnx.ModelProto:
    """One input x of that type, handed through."""
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({kind} x) => ({kind} y) {{ y = Identity(x) }}'
    )


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def test_a_folder_of_npz_gives_one_sample_a_file_in_the_order_of_names(tmp_path: Path, two: Any) -> None:
    for number in (1, 0, 2):
        np.savez(tmp_path / f"{number}.npz", x=X[number : number + 1], id=IDS[number], other=np.ones(3))
    samples = read_feeds(tmp_path, two)
    assert len(samples) == 3
    for _ in range(2):
        for number, feed in enumerate(samples):
            assert list(feed) == ["x", "id"]
            assert same(feed["x"], X[number : number + 1])
            assert feed["id"] == number
    assert [int(feed["id"]) for feed in samples[1:]] == [1, 2]
    assert samples[-1]["id"] == 2


def test_files_of_a_folder_are_read_only_when_asked_for(tmp_path: Path, one: Any) -> None:
    np.savez(tmp_path / "0.npz", x=X[:2])
    (tmp_path / "1.npz").write_bytes(b"no archive")
    samples = read_feeds(str(tmp_path), one)
    assert same(samples[0]["x"], X[:2])
    with pytest.raises(UsageError, match=r"1\.npz: not a readable \.npz"):
        samples[1]


def test_one_npz_is_split_along_its_first_axis(tmp_path: Path, two: Any) -> None:
    np.savez(tmp_path / "all.npz", x=X, id=IDS)
    samples = read_feeds(tmp_path / "all.npz", two)
    assert [feed["x"].shape for feed in samples] == [(1, 3, 4)] * 5
    assert all(same(feed["x"][0], X[number]) for number, feed in enumerate(samples))
    assert [feed["id"].shape for feed in samples] == [()] * 5
    assert [int(feed["id"]) for feed in samples] == list(range(5))


def test_one_npz_with_a_sample_axis_keeps_batches_and_a_scalar_serves_all(tmp_path: Path, two: Any) -> None:
    batches = np.stack([X[:2], X[2:4]])
    np.savez(tmp_path / "all.npz", x=batches, id=np.array(7), k=np.ones((2, 4), np.float32))
    samples = read_feeds(tmp_path / "all.npz", two)
    assert len(samples) == 2
    assert same(samples[1]["x"], X[2:4])
    assert samples[1]["id"] == 7
    assert same(samples[0]["k"], np.ones(4, np.float32))


def test_a_folder_of_npy_adds_the_batch_axis_where_it_is_missing(tmp_path: Path, one: Any) -> None:
    np.save(tmp_path / "a.npy", X[0])
    np.save(tmp_path / "b.npy", X[1:3])
    samples = read_feeds(tmp_path, one)
    assert same(samples[0]["x"], X[:1])
    assert same(samples[1]["x"], X[1:3])


def test_python_gives_feeds_as_a_mapping_a_list_a_generator_or_a_function(one: Any) -> None:
    def generate() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": X[:1]}
        yield {"x": X[1:2]}

    sources: list[tuple[Any, int]] = [({"x": X}, 1), ([{"x": X}] * 3, 3), (generate(), 2), (generate, 2)]
    for source, count in sources:
        samples = read_feeds(source, one)
        assert len(list(samples)) == len(list(samples)) == count
        assert same(samples[0]["x"], X[:1]) or same(samples[0]["x"], X)


def test_a_function_in_a_file_or_module_gives_feeds(
    tmp_path: Path, one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import numpy as np\ndef feeds():\n    return [{'x': np.ones((n, 3, 4), 'f4')} for n in (1, 2)]\n"
    (tmp_path / "mine_for_data.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for source in (f"{tmp_path / 'mine_for_data.py'}:feeds", "mine_for_data:feeds"):
        assert [feed["x"].shape for feed in read_feeds(source, one)] == [(1, 3, 4), (2, 3, 4)]
    sys.modules.pop("mine_for_data")


@pytest.mark.parametrize(
    ("declared", "given"), [("float", np.float64), ("int64", np.int32), ("int32", np.int64)]
)
def test_casts_that_lose_nothing_of_note_are_made(declared: str, given: Any) -> None:
    model = identity(f"{declared}[3]")
    feed = read_feeds([{"x": np.array([1, 2, 3], given)}], model)[0]
    assert feed["x"].dtype == {"float": np.float32, "int64": np.int64, "int32": np.int32}[declared]
    assert feed["x"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("declared", "array", "message"),
    [
        ("float", np.array([1, 2, 3], np.uint8), "takes float32, found uint8; convert it"),
        ("float", np.array([1e300, 0, 0]), "takes float32, found float64, and its values do not fit"),
        ("int32", np.array([1, 2, 2**40]), "takes int32, found int64, and its values do not fit"),
        ("float", np.array(["a", "b", "c"]), "takes float32, found <U1"),
        ("float", np.ones((1, 3), np.float32), "declared as 3, found 1 x 3"),
        ("float", np.ones(4, np.float32), "declared as 3, found 4"),
    ],
)
def test_a_wrong_dtype_or_shape_is_named(declared: str, array: np.ndarray, message: str) -> None:
    model = identity(f"{declared}[3]")
    with pytest.raises(UsageError, match=f"data: sample 0: input 'x' .*{message}"):
        read_feeds([{"x": array}], model)


def test_strings_come_as_objects(tmp_path: Path) -> None:
    model = identity("string[n]")
    np.savez(tmp_path / "0.npz", x=np.array(["a", "bc"]))
    feed = read_feeds(tmp_path, model)[0]
    assert feed["x"].dtype == object
    assert feed["x"].tolist() == ["a", "bc"]


def test_a_missing_input_is_named_with_what_is_there(tmp_path: Path, two: Any) -> None:
    np.savez(tmp_path / "0.npz", y=X[:1], id=IDS[0])
    with pytest.raises(UsageError, match=r"0\.npz: no array for input 'x' \(it has 'y', 'id'\)"):
        read_feeds(tmp_path, two)


def test_places_without_samples_are_refused(tmp_path: Path, one: Any, two: Any) -> None:
    with pytest.raises(UsageError, match=r"holds neither \.npz nor \.npy"):
        read_feeds(tmp_path, one)
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        read_feeds(tmp_path / "nowhere", one)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UsageError, match=r"notes\.txt: is neither a folder nor \.npz"):
        read_feeds(tmp_path / "notes.txt", one)
    with pytest.raises(UsageError, match="the source holds no samples"):
        read_feeds([], one)
    np.save(tmp_path / "a.npy", X[0])
    with pytest.raises(UsageError, match=r"models with one input, not 'x', 'id'; use \.npz"):
        read_feeds(tmp_path, two)


def test_archives_that_cannot_be_read_are_refused(tmp_path: Path, one: Any) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, x=X)
    whole = path.read_bytes()
    pickled = np.empty(2, object)
    pickled[:] = [{}, []]
    np.savez(tmp_path / "pickle.npz", x=pickled)
    np.save(tmp_path / "lone.npy", X)
    others = [(tmp_path / name).read_bytes() for name in ("pickle.npz", "lone.npy")]
    for content in (b"", b"PK no archive", whole[: len(whole) // 2], *others):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.npz: not a readable \.npz") as caught:
            read_feeds(path, one)
        assert "\n" not in str(caught.value)
    path.with_name("lone").mkdir()
    (tmp_path / "lone" / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UsageError, match=r"a\.npy: not a readable \.npy"):
        read_feeds(tmp_path / "lone", one)


def test_inputs_with_different_numbers_of_samples_are_refused(tmp_path: Path, two: Any) -> None:
    np.savez(tmp_path / "all.npz", x=X, id=IDS[:4])
    with pytest.raises(UsageError, match="differ in their number of samples: 'x' 5, 'id' 4"):
        read_feeds(tmp_path / "all.npz", two)


def test_python_targets_that_cannot_be_used_are_refused(tmp_path: Path, one: Any) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(UsageError, match=r"broken\.py' failed: ModuleNotFoundError"):
        read_feeds(f"{path}:feeds", one)
    path.write_text("def feeds():\n    raise KeyError('lost')\nvalue = 3\n")
    with pytest.raises(UsageError, match=r"failed to give samples: KeyError: 'lost'"):
        read_feeds(f"{path}:feeds", one)
    with pytest.raises(UsageError, match="has no function 'other'"):
        python_target(f"{path}:other")
    with pytest.raises(UsageError, match="has no function 'value'"):
        python_target(f"{path}:value")
    with pytest.raises(UsageError, match=r"no such file .*gone\.py"):
        read_feeds(f"{tmp_path / 'gone.py'}:feeds", one)
    with pytest.raises(UsageError, match=r"expected file\.py:function"):
        python_target("nonsense")
    with pytest.raises(UsageError, match="sample 0 is a list; expected a dict"):
        read_feeds(cast(Any, [[X]]), one)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image=1x3x224x224", ("image", (1, 3, 224, 224))),
        ("a:0;b=c=7", ("a:0;b=c", (7,))),
        ("sr=", ("sr", ())),
        ("empty=0x4", ("empty", (0, 4))),
    ],
)
def test_a_shape_is_parsed(text: str, expected: tuple[str, tuple[int, ...]]) -> None:
    assert parse_shape(text) == expected


@pytest.mark.parametrize("text", ["", "x", "=1x2", "x=1x", "x=ax2", "x=-1x3", "x=1,3", "x=1 x 3"])
def test_nonsense_for_a_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="expected name=AxBxC, for example image=1x3x224x224"):
        parse_shape(text)
