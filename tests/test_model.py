"""Loading from everything, and refusing with one clear line."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxopt.errors import ModelError
from onnxopt.graph import tensor_bytes, tensors
from onnxopt.model import fingerprint, load, opener
from onnxopt.protobuf import dump, skeleton
from onnxopt.storage import materialize
from onnxopt.structure import find_problem
from tests.support import assert_equivalent, execute, random_feeds, text_model

TEXT = "agraph (float[2,3] x) => (float[2,3] y) { a = Relu(x)\n y = Neg(a) }"


def weighted(folder: Path, name: str = "m.onnx", location: str = "m.data") -> Path:
    """A model with one external weight of 16 KiB."""
    weight = np.arange(4096, dtype=np.float32).reshape(1, 4096)
    tensor = onnx.numpy_helper.from_array(weight, "w")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4096])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4096])],
        [tensor],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / name, save_as_external_data=True, location="m.data", size_threshold=0)
    if location != "m.data":
        proto = onnx.load(folder / name, load_external_data=False)
        next(e for e in proto.graph.initializer[0].external_data if e.key == "location").value = location
        (folder / name).write_bytes(proto.SerializeToString())
    return folder / name


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "file", "proto", "ir"])
def test_loads_from_everything_and_leaves_it_alone(kind: str, tmp_path: Path) -> None:
    proto = text_model(TEXT)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    sources = {
        "path": path,
        "str": str(path),
        "bytes": proto.SerializeToString(),
        "file": io.BytesIO(proto.SerializeToString()),
        "proto": proto,
        "ir": ir.from_proto(proto),
    }
    source = sources[kind]
    fresh = opener(source)
    first, second = fresh(), fresh()
    first.graph[0].op_type = "Abs"
    assert second.graph[0].op_type == "Relu"
    assert_equivalent(proto, second)
    if isinstance(source, ir.Model):
        assert source.graph[0].op_type == "Relu"


def no_opset() -> bytes:
    proto = text_model(TEXT)
    del proto.opset_import[:]
    return bytes(proto.SerializeToString())


def newer(field: str) -> bytes:
    proto = text_model(TEXT)
    if field == "ir":
        proto.ir_version = 99
    else:
        proto.opset_import[0].version = 999
    return bytes(proto.SerializeToString())


def cyclic() -> bytes:
    proto = text_model(TEXT)
    proto.graph.node[0].input[0] = "y"
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"hello, this is a text file\n" * 10, "not an ONNX model"),
        (bytes(range(256)) * 8, "not an ONNX model"),
        (text_model(TEXT).SerializeToString()[:-7], "not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
        (no_opset(), "no opset import"),
        (newer("ir"), "IR version 99 is newer"),
        (newer("opset"), "opset 999 is newer"),
        (cyclic(), "has a cycle"),
    ],
)
def test_bad_files_are_refused_in_one_line(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "nope.onnx")


def test_external_data_stays_lazy_and_is_right(tmp_path: Path) -> None:
    model = load(weighted(tmp_path))
    (tensor,) = tensors(model)
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor_bytes(model) == 16384
    np.testing.assert_array_equal(tensor.numpy()[0, :3], [0, 1, 2])


@pytest.mark.parametrize("location", ["../outside.data", "/etc/hostname", "sub/../../x.data"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside.data").write_bytes(bytes(16384))
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(weighted(folder, location=location))


def test_external_data_behind_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = weighted(folder)
    (folder / "m.data").rename(tmp_path / "outside.data")
    (folder / "m.data").symlink_to(tmp_path / "outside.data")
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_missing_and_truncated_external_data_are_refused(tmp_path: Path) -> None:
    path = weighted(tmp_path)
    os.truncate(tmp_path / "m.data", 100)
    with pytest.raises(ModelError, match=r"is cut off: 'm\.data' has 100 bytes, 16384 are needed"):
        load(path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"is missing: no file 'm\.data' beside the model"):
        load(path)


def test_external_data_in_bytes_has_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="load the model from its path"):
        load(weighted(tmp_path).read_bytes())


def test_unsorted_nodes_are_sorted() -> None:
    proto = text_model(TEXT)
    first = proto.graph.node[0]
    second = proto.graph.node[1]
    swapped = text_model(TEXT)
    del swapped.graph.node[:]
    swapped.graph.node.extend([second, first])
    assert [node.op_type for node in load(swapped).graph] == ["Relu", "Neg"]


def test_unsorted_nodes_of_bodies_and_functions_are_sorted() -> None:
    model = load(
        text_model(
            """
            <ir_version: 10, opset_import: ["" : 17, "local" : 1]>
            agraph (float[2] x, bool c) => (float[2] y) {
                y = If (c) <
                    then_branch = yes () => (float[2] u) { u = Neg(v)\n v = Add(x, late) },
                    else_branch = no () => (float[2] w) { w = local.F(x) }
                >
                late = Abs(x)
            }
            <domain: "local", opset_import: ["" : 17]>
            F (p) => (q) { q = Neg(r)\n r = Abs(p) }
            """
        )
    )
    assert [node.op_type for node in model.graph] == ["Abs", "If"]
    assert find_problem(model) is None
    assert find_problem(model.clone()) is None


def test_skeleton_leaves_weights_out_and_the_model_alone(tmp_path: Path) -> None:
    model = load(weighted(tmp_path))
    before = dump(model).SerializeToString(deterministic=True)
    proto = skeleton(model)
    assert [value.name for value in proto.graph.input] == ["x", "w"]
    assert not proto.graph.initializer
    onnx.checker.check_model(proto)
    assert dump(model).SerializeToString(deterministic=True) == before


def test_fingerprint_sees_weights_and_graph(tmp_path: Path) -> None:
    path = weighted(tmp_path)
    first = fingerprint(path)
    assert fingerprint(path) == first
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[5] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    assert fingerprint(path) != first
    proto = text_model(TEXT)
    assert fingerprint(proto) == fingerprint(proto.SerializeToString(deterministic=True))


def test_fingerprint_of_large_weights_reads_pages_of_them(tmp_path: Path) -> None:
    path, seen = weighted(tmp_path), set()
    with (tmp_path / "m.data").open("rb+") as file:
        file.truncate(1 << 30)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].dims[:] = [1 << 18, 1 << 10]
    del proto.graph.initializer[0].external_data[1:]
    path.write_bytes(proto.SerializeToString())
    for place in (0, (1 << 30) - 4, (1 << 29) - 4):
        with (tmp_path / "m.data").open("rb+") as file:
            file.seek(place)
            file.write(b"\1\2\3\4")
        seen |= {fingerprint(path), fingerprint(load(path))}
    assert len(seen) == 4  # the last place is on no page that is read


def test_materialize_gives_what_a_runtime_opens(tmp_path: Path) -> None:
    path = weighted(tmp_path)
    with materialize(path) as opened:
        assert opened == path
    model = load(path)
    feeds = random_feeds(onnx.load(path))
    with materialize(model) as opened:
        assert isinstance(opened, bytes)
        np.testing.assert_array_equal(
            execute(onnx.load(path), feeds)[0], execute(onnx.load(io.BytesIO(opened)), feeds)[0]
        )
