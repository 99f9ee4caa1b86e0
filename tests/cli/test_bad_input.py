"""Bad input through the command line: one clear line, exit code 2, nothing written, nothing changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.cli import main
from tests.support import text_model

Change = Callable[[onnx.ModelProto], object]
Optimize = Callable[..., tuple[int, str]]

TEXT = """
agraph (float[N,3] x) => (float[N,3] y) <float[3] w = {1, 2, 3}> {
    a = Identity(x)
    b = Mul(a, w)
    y = Relu(b)
}
"""


@pytest.fixture(name="optimize")
def run_optimize(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Optimize:
    """Run `optimize MODEL -o out.onnx --no-bench ...`: the exit code and what stands on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(model: str, *options: str, output: str = "out.onnx") -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["optimize", model, "-o", output, "--no-bench", *options])
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


def refused(answer: tuple[int, str], complaint: str) -> None:
    code, said = answer
    assert code == 2, said
    assert said.startswith("onnxopt: ")
    assert complaint in said
    assert said.count("\n") == 1
    assert not Path("out.onnx").exists()
    assert not list(Path().glob(".out.onnx.*"))


def sparse(proto: onnx.ModelProto) -> None:
    weight = proto.graph.sparse_initializer.add(dims=[3])
    weight.values.CopyFrom(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))
    weight.indices.CopyFrom(numpy_helper.from_array(np.array([0, 2], np.int64), "w_places"))
    proto.graph.ClearField("initializer")


def sparse_in_a_branch(proto: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(proto)
    sparse(other)
    proto.graph.node.append(
        helper.make_node("If", ["a"], ["z"], then_branch=other.graph, else_branch=proto.graph)
    )


DAMAGE: dict[str, tuple[Change, str]] = {
    "no graph": (lambda p: p.ClearField("graph"), "no graph"),
    "no opset": (lambda p: p.ClearField("opset_import"), "no opset import"),
    "no default opset": (lambda p: setattr(p.opset_import[0], "domain", "my"), "such as Identity"),
    "opset 0": (lambda p: setattr(p.opset_import[0], "version", 0), "opset 0 does not exist"),
    "newer opset": (lambda p: setattr(p.opset_import[0], "version", 999), "opset 999 is newer"),
    "newer ir": (lambda p: setattr(p, "ir_version", 99), "IR version 99 is newer"),
    "negative ir": (lambda p: setattr(p, "ir_version", -1), "no IR version"),
    "dangling input": (
        lambda p: p.graph.node[2].input.__setitem__(0, "q"),
        "(Relu) reads 'q', which nothing",
    ),
    "output of no node": (lambda p: setattr(p.graph.output[0], "name", "q"), "graph output 'q'"),
    "two of a name": (
        lambda p: p.graph.node.append(helper.make_node("Neg", ["a"], ["b"])),
        "'b' is redeclared",
    ),
    "cycle": (lambda p: p.graph.node[0].input.__setitem__(0, "y"), "cycle"),
    "weight without a name": (lambda p: p.graph.initializer[0].ClearField("name"), "has no name"),
    "weight too short": (
        lambda p: p.graph.initializer[0].dims.__setitem__(0, 5),
        "'w' does not fit its shape",
    ),
    "negative size": (lambda p: p.graph.initializer[0].dims.__setitem__(0, -3), "negative size"),
    "weight of no type": (lambda p: setattr(p.graph.initializer[0], "data_type", 0), "no element type"),
    "weight of no known type": (
        lambda p: setattr(p.graph.initializer[0], "data_type", 99),
        "99 is not a valid",
    ),
    "sparse weight": (sparse, "sparse initializer 'w'"),
    "sparse weight in a branch": (sparse_in_a_branch, "sparse initializer 'w'"),
    "training info": (lambda p: p.training_info.add(), "training info would be lost"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused(damage: str, optimize: Optimize) -> None:
    change, complaint = DAMAGE[damage]
    proto = text_model(TEXT)
    change(proto)
    Path("m.onnx").write_bytes(content := proto.SerializeToString())
    refused(optimize("m.onnx"), complaint)
    assert Path("m.onnx").read_bytes() == content


def test_what_the_library_below_cannot_hold_is_refused_by_name(optimize: Optimize) -> None:
    proto = text_model(TEXT)
    proto.graph.output.append(
        helper.make_value_info("b", helper.make_map_type_proto(TensorProto.INT64, proto.graph.input[0].type))
    )
    Path("m.onnx").write_bytes(proto.SerializeToString())
    refused(optimize("m.onnx"), "m.onnx: Map types are not supported")


@pytest.mark.parametrize("content", [b"", b"hello\nworld\n", b"<html></html>", bytes(range(256)) * 9])
def test_what_is_no_protobuf_is_refused(content: bytes, optimize: Optimize) -> None:
    Path("m.onnx").write_bytes(content)
    refused(optimize("m.onnx"), "m.onnx: ")


def test_a_model_cut_off_anywhere_is_refused(optimize: Optimize) -> None:
    whole = text_model(TEXT).SerializeToString()
    for length in range(0, len(whole), 9):
        Path("m.onnx").write_bytes(whole[:length])
        refused(optimize("m.onnx"), "m.onnx: ")


def external(folder: Path, **recorded: object) -> Path:
    """A model whose weights `w` and `v` overlap in one file; `recorded` is what it says of `w`."""
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(6000, dtype=np.float32).tofile(folder / "w.bin")
    proto = text_model(
        "agraph (float[4096] x) => (float[4096] y) { a = Add(x, w)\n b = Identity(a)\n y = Mul(b, v) }"
    )
    for name, offset in (("w", 0), ("v", 4096)):
        tensor = proto.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=[4096])
        tensor.data_location = TensorProto.EXTERNAL
        about = {"location": "w.bin", "offset": offset, "length": 16384} | (recorded if name == "w" else {})
        for key, value in about.items():
            tensor.external_data.add(key=key, value=str(value))
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("location", "../w.bin", "lies outside the model's folder"),
        ("location", "/etc/hostname", "lies outside the model's folder"),
        ("location", "", "is missing"),
        ("location", ".", "is missing"),
        ("location", "none.bin", "no file 'none.bin' beside the model"),
        ("offset", "-4096", "non-negative"),
        ("offset", "word", "word"),
        ("offset", "12000", "is cut off"),
        ("length", "100", "has 100 bytes on record, its type and shape 16384"),
        ("length", "99999999", "has 99999999 bytes on record"),
    ],
)
def test_bad_external_data_is_refused(key: str, value: str, complaint: str, optimize: Optimize) -> None:
    external(Path("folder"), **{key: value})
    refused(optimize("folder/m.onnx"), complaint)


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_external_data_that_tools_have_linked_is_read(optimize: Optimize) -> None:
    """Package managers hard-link files; download caches hold links to files in one other folder."""
    external(Path("blobs"))
    os.link("blobs/w.bin", "linked.bin")
    assert optimize("blobs/m.onnx") == (0, "")
    Path("snapshot").mkdir()
    for name in ("m.onnx", "w.bin"):
        Path("snapshot", name).symlink_to(Path("..", "blobs", name))
    assert optimize("snapshot/m.onnx") == (0, "")
    Path("plain").mkdir()
    Path("plain/m.onnx").write_bytes(Path("blobs/m.onnx").read_bytes())
    Path("plain/w.bin").symlink_to(Path("..", "blobs", "w.bin"))
    Path("out.onnx").unlink()
    refused(optimize("plain/m.onnx"), "lies outside the model's folder")


def test_external_data_of_a_constant_node_comes_along(optimize: Optimize) -> None:
    proto = onnx.load(external(Path("folder")))
    graph = proto.graph
    for tensor in graph.initializer:
        graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    graph.ClearField("initializer")
    onnx.save(
        proto,
        "folder/c.onnx",
        save_as_external_data=True,
        location="c.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    assert optimize("folder/c.onnx", "--pass", "eliminate-identity") == (0, "")
    Path("folder/c.bin").unlink()
    onnx.checker.check_model(onnx.load("out.onnx"))


def test_a_model_is_not_written_over_its_own_data(optimize: Optimize) -> None:
    external(Path("folder"))
    weights = Path("folder/w.bin").read_bytes()
    refused(optimize("folder/m.onnx", output="folder/w.bin"), "the model's own external data is in this file")
    assert Path("folder/w.bin").read_bytes() == weights


def test_in_place_the_old_data_stays(optimize: Optimize) -> None:
    path = external(Path("folder"))
    before = onnx.load(path).SerializeToString()
    for _ in range(2):
        assert optimize("folder/m.onnx", output="folder/m.onnx") == (0, "")
    assert len(list(Path("folder").glob("m.onnx.*.data"))) == 1
    external(Path("again"))
    assert Path("folder/w.bin").read_bytes() == Path("again/w.bin").read_bytes()
    assert onnx.load("again/m.onnx").SerializeToString() == before


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
def test_pipes_and_devices_are_no_models_and_no_places(optimize: Optimize) -> None:
    os.mkfifo("pipe")
    refused(optimize("pipe"), "pipe: is no regular file")
    Path("m.onnx").write_bytes(text_model(TEXT).SerializeToString())
    refused(optimize("m.onnx", output="pipe"), "pipe: cannot be written: it is no regular file")
    assert Path("pipe").is_fifo()
    refused(optimize("m.onnx", output="n" * 300), "File name too long")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("m.onnx", "this is no report"),
        ("./out.onnx", "this is no report"),
        ("out.session.json", "this is no report"),
        ("none/r.json", "there is no folder 'none'"),
        (".", "it is a folder"),
    ],
)
def test_a_bad_place_for_the_report_is_refused_before_the_work(
    place: str, complaint: str, optimize: Optimize
) -> None:
    Path("m.onnx").write_bytes(content := text_model(TEXT).SerializeToString())
    refused(optimize("m.onnx", "--json", place), complaint)
    assert Path("m.onnx").read_bytes() == content


def test_data_from_a_function_that_exits_is_refused(optimize: Optimize) -> None:
    Path("m.onnx").write_bytes(text_model(TEXT).SerializeToString())
    Path("exits.py").write_text("def feeds():\n    raise SystemExit(0)\n")
    Path("script.py").write_text("raise SystemExit(0)\n")
    refused(optimize("m.onnx", "--data", "exits.py:feeds"), "it failed to give samples")
    refused(optimize("m.onnx", "--data", "script.py:feeds"), "loading 'script.py' failed")


def test_inputs_beyond_memory_are_refused(optimize: Optimize) -> None:
    Path("m.onnx").write_bytes(text_model(TEXT).SerializeToString())
    refused(optimize("m.onnx", "--shape", "x=99999999999999x3"), "not enough memory")


@pytest.mark.skipif(os.name != "posix", reason="file names hold no line ends there")
def test_any_file_name_works_and_is_told_in_one_line(optimize: Optimize) -> None:
    refused(optimize("no\nsuch.onnx"), "no\\nsuch.onnx: no such file")
    for name in ("two\nlines.onnx", "a b.onnx", "é中.onnx", "[bold]x.onnx", "-x.onnx"):
        Path(name).write_bytes(text_model(TEXT).SerializeToString())
        assert optimize(f"./{name}", output=f"./{name}.out") == (0, ""), name
        assert Path(f"{name}.out").exists()


def test_what_the_model_says_of_itself_is_kept(optimize: Optimize) -> None:
    proto = text_model(TEXT)
    proto.doc_string, proto.producer_name, proto.domain, proto.model_version = "doc", "maker", "org", 7
    proto.metadata_props.add(key="author", value="me")
    proto.graph.doc_string = proto.graph.node[1].doc_string = proto.graph.input[0].doc_string = "doc"
    proto.graph.input[0].type.denotation = "IMAGE"
    note = proto.graph.quantization_annotation.add(tensor_name="b")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    Path("m.onnx").write_bytes(proto.SerializeToString())
    assert optimize("m.onnx", "--no-metadata") == (0, "")
    kept = onnx.load("out.onnx")
    for field in ("doc_string", "producer_name", "domain", "model_version", "metadata_props"):
        assert getattr(kept, field) == getattr(proto, field)
    for field in ("doc_string", "input", "output", "quantization_annotation"):
        assert getattr(kept.graph, field) == getattr(proto.graph, field)
    assert [node.doc_string for node in kept.graph.node] == ["doc", ""]


def test_without_onnxruntime_one_line_says_what_to_install(tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    model.write_bytes(text_model(TEXT).SerializeToString())
    program = (
        "import sys; sys.modules['onnxruntime'] = None; from onnxopt.cli import main; main(sys.argv[1:])"
    )

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "optimize", str(model), "-o", str(out), *options],
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 2
    assert (
        done.stderr
        == "onnxopt: onnxruntime is not installed: pip install 'onnxopt[cpu]' (or 'onnxopt[gpu]')\n"
    )
    assert not out.exists()
    assert run("--no-verify", "--no-bench").returncode == 0
