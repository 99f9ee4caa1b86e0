"""Packs: the files come back the same to the byte; a damaged or hostile pack is one line and no file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.cli import main
from onnxopt.errors import ModelError, UsageError
from onnxopt.packing.container import Index, Member, name_complaint, open_pack, write_end
from onnxopt.packing.packer import sources_of
from tests.support import execute, text_model

SMALL = "agraph (float[64] x) => (float[64] y) { y = Relu(x) }"
Package = onnxopt.Package


def model_of(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    model = text_model(SMALL)
    model.graph.initializer.extend(tensors)
    return model


def floats(size: int = 1000, name: str = "w", share: float = 0.9) -> np.ndarray:
    rng = np.random.default_rng(len(name))
    weights = rng.standard_normal(size).astype(np.float32)
    weights[rng.random(size) < share] = 0
    return weights


def written(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def round_trip(path: Path) -> Package:
    """Pack and unpack into another folder; all files have to be the same."""
    pack, folder = path.parent / "m.onnxpack", path.parent / "back"
    package = onnxopt.pack(path, pack)
    folder.mkdir()
    again = onnxopt.unpack(pack, folder / path.name)
    assert again == package
    assert package.packed_bytes == pack.stat().st_size
    assert sorted(name for name, _ in package.files) == sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )
    for name, size in package.files:
        assert (folder / name).read_bytes() == (path.parent / name).read_bytes()
        assert (folder / name).stat().st_size == size
    return package


def external(folder: Path, location: str = "w.bin") -> Path:
    """A model of two tensors in a file of their own, with other bytes before, between and after them."""
    weights = floats(3000)
    (folder / location).parent.mkdir(exist_ok=True, parents=True)
    (folder / location).write_bytes(
        b"head" * 10 + weights.tobytes() + b"gap" + weights[:100].tobytes() + b"tail"
    )
    tensors = []
    for name, offset, size in (("a", 40, 3000), ("b", 12043, 100)):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[size])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", 4 * size)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
    return written(model_of(*tensors), folder)


DTYPES = [
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.uint8, np.int16, np.uint16, np.int32,
    np.uint32, np.int64, np.uint64, np.bool_, np.complex64, np.complex128, ml_dtypes.int4, ml_dtypes.uint4,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn,
]  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES),
    size=st.integers(0, 3000),
    share=st.sampled_from([0, 0.5, 0.95]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tensors_of_all_types_come_back(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, size: int, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(-8, 8, size).astype(dtype)
    array[rng.random(size) < share] = np.zeros((), dtype)
    tensor = ir.to_proto(ir.tensor(array, name="w"))
    package = round_trip(written(model_of(tensor), tmp_path_factory.mktemp("pack")))
    assert sum(raw for _, raw, _ in package.codings.values()) == package.bytes


def test_tensors_are_found_wherever_they_lie(
    tmp_path: Path,
) -> None:
    weights = floats()
    raw = numpy_helper.from_array(weights, "raw")
    typed = [
        helper.make_tensor("f", TensorProto.FLOAT, [1000], weights),
        helper.make_tensor("d", TensorProto.DOUBLE, [1000], weights.astype(np.float64)),
        helper.make_tensor("i", TensorProto.INT32, [1000], np.arange(1000)),
        helper.make_tensor("h", TensorProto.FLOAT16, [1000], weights.astype(np.float16)),
        TensorProto(name="s", data_type=TensorProto.STRING, dims=[2], string_data=[b"a" * 900, b""]),
    ]
    model = model_of(raw, *typed)
    branch = helper.make_graph([], "branch", [], [], [raw])
    constant = helper.make_node("Constant", [], ["c"], value=raw, name="constant")
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch))
    model.graph.node.append(constant)
    model.graph.sparse_initializer.add(dims=[10]).values.CopyFrom(raw)
    model.functions.append(helper.make_function("my", "f", [], ["c"], [constant], model.opset_import))
    model.training_info.add().initialization.initializer.append(raw)
    path = written(model, tmp_path)
    (source,) = sources_of(path)
    kinds = [tensor.kind for tensor in source.tensors]
    # In the order of the file: fields by their numbers, so nodes first, functions and training last.
    assert kinds.count("f4") == 1 + 2 + 1 + 1 + 1 + 1 + 1
    assert kinds.count("f8") == 1
    assert kinds.count("u1") == 2
    file = path.read_bytes()
    parts = [file[tensor.offset : tensor.offset + tensor.size] for tensor in source.tensors]
    assert parts.count(weights.tobytes()) == 8
    round_trip(path)


def test_external_data_comes_back_with_what_lies_between_the_tensors(tmp_path: Path) -> None:
    package = round_trip(external(tmp_path, "weights/w.bin"))
    assert [name for name, _ in package.files] == ["m.onnx", "weights/w.bin"]
    assert package.packed_bytes < 3000


def test_a_pack_loads_as_a_model(tmp_path: Path) -> None:
    for path in (external(tmp_path), written(text_model(SMALL), tmp_path)):
        pack = tmp_path / "m.onnxpack"
        onnxopt.pack(path, pack)
        model = onnxopt.load(path)
        packed = onnxopt.load(pack)
        assert list(packed.graph.initializers) == list(model.graph.initializers)
        for name, value in model.graph.initializers.items():
            have, want = packed.graph.initializers[name].const_value, value.const_value
            assert have is not None
            assert want is not None
            assert have.tobytes() == want.tobytes()
            assert not isinstance(have, ir.ExternalTensor)
        assert onnxopt.verify(path, pack, kind="exact").ok


def test_models_in_memory_are_packed_as_they_would_be_saved(tmp_path: Path) -> None:
    model = model_of(numpy_helper.from_array(floats(), "w"))
    content = model.SerializeToString(deterministic=True)
    pack, back = tmp_path / "p", tmp_path / "b.onnx"
    for kind in (content, model):
        onnxopt.pack(kind, pack)
        onnxopt.unpack(pack, back)
        assert back.read_bytes() == content
    x = {"x": floats(64)}
    onnxopt.pack(onnxopt.load(content), pack)
    np.testing.assert_array_equal(execute(onnxopt.load(pack), x), execute(model, x))


def test_the_same_model_gives_the_same_pack(tmp_path: Path) -> None:
    path = external(tmp_path)
    for name in ("a", "b"):
        onnxopt.pack(path, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(name="pack", scope="module")
def small_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    path = written(model_of(numpy_helper.from_array(floats(100, share=0.5), "w")), folder)
    onnxopt.pack(path, folder / "m.onnxpack")
    return folder / "m.onnxpack"


def refused(content: bytes, folder: Path, complaint: str = "") -> None:
    """No file is written, and the error is one line that names the pack."""
    (folder / "bad.onnxpack").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        onnxopt.unpack(folder / "bad.onnxpack", folder / "out.onnx")
    assert str(caught.value).startswith(f"{folder / 'bad.onnxpack'}: ")
    assert "\n" not in str(caught.value)
    assert complaint in str(caught.value)
    assert os.listdir(folder) == ["bad.onnxpack"]


def test_every_flipped_bit_and_every_cut_is_refused(pack: Path, tmp_path: Path) -> None:
    content = pack.read_bytes()
    assert len(content) < 1000
    for place in range(len(content)):
        flipped = content[place] ^ (1 << place % 8)
        refused(content[:place] + bytes([flipped]) + content[place + 1 :], tmp_path)
        refused(content[:place], tmp_path)
    for tail in (b"\0", b"garbage" * 100, content):
        refused(content + tail, tmp_path)


def test_other_files_are_no_packs(pack: Path, tmp_path: Path) -> None:
    refused(b"", tmp_path, "not a pack of onnxopt")
    refused(b"PK\3\4" + bytes(100), tmp_path, "not a pack of onnxopt")
    content = pack.read_bytes()
    refused(content[:8] + b"\2" + content[9:], tmp_path, "version 2 of the format is not known, only 1")


def rewritten(pack: Path, change: Callable[[Index], Index], path: Path) -> bytes:
    """The pack with another index, all checksums right."""
    with pack.open("rb") as file:
        index, starts = open_pack(file, "")
        file.seek(0)
        blocks = file.read(starts[-1] + sum(index.blocks[-1].stored))
    with path.open("wb") as target:
        target.write(blocks)
        write_end(target, change(index))
    return path.read_bytes()


def file_of(**changes: Any) -> Callable[[Index], Index]:
    return lambda index: replace(index, files=(replace(index.files[0], **changes),))


def block_of(**changes: Any) -> Callable[[Index], Index]:
    return lambda index: replace(index, blocks=(replace(index.blocks[0], **changes), *index.blocks[1:]))


HOSTILE: dict[str, tuple[Callable[[Index], Index], str]] = {
    "no files": (lambda index: replace(index, files=()), "no file in it"),
    "out of the folder": (file_of(name="../m.onnx"), "no plain relative file name"),
    "absolute": (file_of(name="/tmp/m.onnx"), "no plain relative file name"),
    "drive": (file_of(name="C:m.onnx"), "no plain relative file name"),
    "backslash": (file_of(name="..\\m.onnx"), "no plain relative file name"),
    "long name": (file_of(name="a" * 2000), "is too long a file name"),
    "deep name": (file_of(name="a/" * 400 + "b"), "is too long a file name"),
    "many files": (
        lambda index: replace(
            index, files=(*index.files, *(Member(f"f{n}", 0, "", ()) for n in range(1 << 14)))
        ),
        "16385 files, more than 16384",
    ),
    "no name": (file_of(name=""), "no plain relative file name"),
    "device": (file_of(name="a\0b"), "no plain relative file name"),
    "name of another type": (file_of(name=5), "makes no sense"),
    "twice": (lambda index: replace(index, files=index.files * 2), "the same name"),
    "other bytes": (file_of(sha256="0" * 64), "is not the file that was packed"),
    "larger": (file_of(size=1 << 30), "its blocks are not those"),
    "smaller": (file_of(size=10), "are larger than the file"),
    "endless": (file_of(size=1 << 61), "are no honest pack"),
    "negative": (file_of(size=-1), "makes no sense"),
    "size of another type": (file_of(size=1.5), "makes no sense"),
    "true": (file_of(size=True), "makes no sense"),
    "huge piece": (file_of(size=1 + (1 << 33), pieces=(1, 1 << 33, 0)), "a block is too large"),
    "two numbers": (file_of(pieces=(0, 1)), "shorter"),
    "endless pieces": (file_of(pieces=(0, 0, 0) * (1 + (1 << 20))), "in more than 1048576 pieces"),
    "a block that is not there": (file_of(pieces=(0, 16, 1 << 40)), "its blocks are not those"),
    "a block more": (lambda index: replace(index, blocks=(*index.blocks, index.blocks[0])), "not those"),
    "a block less": (lambda index: replace(index, blocks=index.blocks[:1]), "its blocks are not those"),
    "kind": (block_of(kind="f3"), "a newer onnxopt may read it"),
    "coding": (block_of(coding="dense+magic"), "a newer onnxopt may read it"),
    "stored": (block_of(stored=(1,)), "the blocks do not fill it"),
    "sum": (block_of(crc=5), "the checksum of a block"),
    "huge stream": (block_of(sizes=(1 << 40,)), "a stream is too large"),
    "sizes": (lambda index: block_of(sizes=(*index.blocks[0].sizes[1:], 7))(index), "damaged"),
    "streams": (lambda index: block_of(sizes=index.blocks[0].sizes[1:])(index), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indices_are_refused(pack: Path, tmp_path: Path, name: str) -> None:
    change, complaint = HOSTILE[name]
    (tmp_path / "in").mkdir()
    refused(rewritten(pack, change, tmp_path / "made"), tmp_path / "in", complaint)


def test_a_bomb_is_refused_before_anything_is_written(pack: Path, tmp_path: Path) -> None:
    """Each block would be allowed: the same 8 MB of zeros, 4096 times."""
    size, count = 1 << 23, 4096
    from onnxopt.packing.container import START, Block
    from onnxopt.packing.entropy import squeeze

    zeros = squeeze(np.zeros(size, np.uint8))
    blocks = tuple(Block("u1", "dense+bytes", (size,), (len(zeros),), 0) for _ in range(count))
    with (tmp_path / "made").open("wb") as file:
        file.write(START + zeros * count)
        write_end(file, Index((Member("m.onnx", size * count, "", ()),), blocks))
    (tmp_path / "in").mkdir()
    refused((tmp_path / "made").read_bytes(), tmp_path / "in", "are no honest pack")


@pytest.mark.parametrize(
    "text", ["[]", "{}", "5", "[" * 100_000, '{"files":[[1]],"blocks":[]}', "\x00", "nul"]
)
def test_an_index_of_another_form_is_refused(
    pack: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", lambda *_args, **_options: text)
        content = rewritten(pack, lambda index: index, tmp_path / "made")
    (tmp_path / "in").mkdir()
    refused(content, tmp_path / "in", "damaged")


@pytest.mark.parametrize(
    ("names", "fine"),
    [
        (["a", "b/c"], True),
        (["a", "A"], False),
        (["a", "a/b"], False),
        (["a/./b"], False),
        (["\ud800"], False),
    ],
)
def test_names_are_relative_and_apart(names: list[str], fine: bool) -> None:
    assert (name_complaint(names) is None) == fine


def test_links_at_the_place_of_a_data_file_are_not_followed(tmp_path: Path) -> None:
    onnxopt.pack(external(tmp_path, "weights/w.bin"), tmp_path / "p")
    outside, folder = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    folder.mkdir()
    (folder / "weights").symlink_to(outside)
    with pytest.raises(ModelError, match="a link leads elsewhere"):
        onnxopt.unpack(tmp_path / "p", folder / "m.onnx")
    (folder / "weights").unlink()
    (folder / "weights").mkdir()
    (folder / "weights" / "w.bin").symlink_to(outside / "file")
    with pytest.raises(ModelError, match="a link leads elsewhere"):
        onnxopt.unpack(tmp_path / "p", folder / "m.onnx")
    assert not list(outside.iterdir())
    assert os.listdir(folder) == ["weights"]


def test_data_of_another_model_is_not_replaced(tmp_path: Path) -> None:
    onnxopt.pack(external(tmp_path), tmp_path / "p")
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "w.bin").write_bytes(b"of another model")
    with pytest.raises(ModelError, match="is there already, and other data"):
        onnxopt.unpack(tmp_path / "p", folder / "m.onnx")
    assert os.listdir(folder) == ["w.bin"]
    with pytest.raises(ModelError, match="it is the model itself"):
        onnxopt.unpack(tmp_path / "p", folder / "w.bin")
    (folder / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes())
    onnxopt.unpack(tmp_path / "p", folder / "m.onnx")
    assert sorted(os.listdir(folder)) == ["m.onnx", "w.bin"]


def test_unpacking_over_a_saved_model_leaves_none_of_its_data(tmp_path: Path) -> None:
    path, found = tmp_path / "m.onnx", []
    for size in (3000, 4000):
        model = onnxopt.load(model_of(numpy_helper.from_array(floats(size), "w")))
        onnxopt.save(model, path, external_data=True)
        found.append({file.name: file.read_bytes() for file in tmp_path.glob("m.onnx*")})
        onnxopt.pack(path, tmp_path / f"pack{size}")
    for size, files in ((4000, found[1]), (3000, found[0]), (3000, found[0])):
        onnxopt.unpack(tmp_path / f"pack{size}", path)
        assert {file.name: file.read_bytes() for file in tmp_path.glob("m.onnx*")} == files


def test_what_is_no_model_is_not_packed(pack: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "out"
    model = written(model_of(numpy_helper.from_array(floats(), "w")), tmp_path).read_bytes()
    for content, complaint in (
        (b"", "it has no graph"),
        (b"\x0a\xff", "cut off"),
        (b"\x3a\x05ab", "cut off: a field is longer"),
        (b"\x3b", "no field has the tag"),
        (b"\xff" * 12, "more than ten bytes"),
        (b"\x38\x01", "is no message"),
        (b"\x08\x0a", "it has no graph"),
        (model[:-1], "cut off"),
        (pack.read_bytes(), "is a pack already"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=complaint):
            onnxopt.pack(path, out)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_external_data_elsewhere_missing_or_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = external(tmp_path / "a")
    with pytest.raises(UsageError, match="this is a file of the model"):
        onnxopt.pack(path, tmp_path / "a" / "w.bin")
    (tmp_path / "a" / "w.bin").write_bytes(b"short")
    with pytest.raises(ModelError, match=r"is cut off: 'w\.bin' has 5 bytes, 12443 are needed"):
        onnxopt.pack(path, tmp_path / "p")
    (tmp_path / "a" / "w.bin").unlink()
    with pytest.raises(ModelError, match=r"is missing: no file 'w\.bin'"):
        onnxopt.pack(path, tmp_path / "p")
    path.write_bytes(path.read_bytes().replace(b"w.bin", b"../ww"))
    with pytest.raises(ModelError, match="lies outside the model's folder"):
        onnxopt.pack(path, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_external_data_of_no_known_size_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.STRING, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    (tmp_path / "w.bin").write_bytes(b"words")
    path = written(model_of(tensor), tmp_path)
    with pytest.raises(ModelError, match="not an ONNX model, or cut off: Bitwidth not available"):
        onnxopt.pack(path, tmp_path / "p")


def test_without_zstandard_it_says_what_to_install(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"pip install 'onnxopt\[pack\]'"):
        onnxopt.pack(written(text_model(SMALL), tmp_path), tmp_path / "p")
    with pytest.raises(UsageError, match=r"pip install 'onnxopt\[pack\]'"):
        onnxopt.load(pack)


def test_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(model_of(numpy_helper.from_array(floats(5000), "w")), tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    code, out, _ = run("pack", "m.onnx", "-o", "m.onnxpack", "--json", "report.json")
    assert code == 0
    assert "times smaller" in out
    report = json.loads(Path("report.json").read_text())
    assert report["schema"] == "onnxopt.pack/1"
    assert report["files"] == [{"name": "m.onnx", "bytes": Path("m.onnx").stat().st_size}]
    assert report["packed_bytes"] == Path("m.onnxpack").stat().st_size
    assert report["ratio"] == report["bytes"] / report["packed_bytes"] > 5
    assert sum(coding["bytes"] for coding in report["codings"]) == report["bytes"]
    code, out, _ = run("unpack", "m.onnxpack", "-o", "back.onnx", "--json", "-")
    assert code == 0
    assert json.loads(out) == {**report, "schema": "onnxopt.unpack/1"}
    assert Path("back.onnx").read_bytes() == Path("m.onnx").read_bytes()
    assert run("inspect", "m.onnxpack")[0] == 0
    Path("m.onnxpack").write_bytes(b"none")
    code, _, err = run("unpack", "m.onnxpack", "-o", "new.onnx")
    assert (code, err) == (2, "onnxopt: m.onnxpack: not a pack of onnxopt\n")
    assert run("unpack", "m.onnx", "-o", "m.onnx")[0] == 2
    assert not Path("new.onnx").exists()


@pytest.mark.slow
def test_memory_is_bounded_by_a_block_not_by_the_model(tmp_path: Path) -> None:
    """300 MB in one file, one tensor of 200 MB among them; both ways stay below 150 MB over the imports."""
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), f"w{size}")
        for size in (50_000_000, 25_000_000)
    ]
    path = written(model_of(*tensors), tmp_path)
    del tensors
    code = textwrap.dedent("""
        import resource, sys, onnxopt
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        small, large, pack, back = sys.argv[1:]
        onnxopt.unpack(small, back)
        before = peak()
        onnxopt.pack(large, pack)
        onnxopt.unpack(pack, back)
        print(peak() - before)
    """)
    onnxopt.pack(text_model(SMALL), tmp_path / "small")
    files = [tmp_path / "small", path, tmp_path / "pack", tmp_path / "back"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
