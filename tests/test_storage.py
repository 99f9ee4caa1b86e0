"""Saving: atomic, streamed, the same bytes each time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt import storage
from onnxopt.errors import ModelError
from onnxopt.model import load
from onnxopt.storage import check_target, save
from tests.support import text_model

TEXT = "agraph (float[2,3] x) => (float[2,3] y) { a = Relu(x)\n y = Neg(a) }"


def weighted(value: float = 1.0, size: int = 8192) -> ir.Model:
    """y = x * w with a weight of 4 * size bytes."""
    model = load(
        text_model(f"agraph (float[{size}] x) => (float[{size}] y) <float[1] s = {{2}}> {{ y = Mul(x, s) }}")
    )
    weight = ir.Value(name="w", const_value=ir.tensor(np.full(size, value, np.float32), name="w"))
    model.graph.register_initializer(weight)
    model.graph[0].replace_input_with(1, weight)
    return model


def weight_of(path: Path) -> np.ndarray:
    proto = onnx.load(path)
    return onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == "w"))


def test_same_model_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save(weighted(), tmp_path / folder / "m.onnx", external_data=True)
    files = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("a", "b")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_external_data_is_named_after_its_content_and_reads_back(tmp_path: Path) -> None:
    path = save(weighted(3.0), tmp_path / "m.onnx", external_data=True)
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert len(data.name) == len("m.onnx..data") + 16
    onnx.checker.check_model(str(path))
    np.testing.assert_array_equal(weight_of(path), np.full(8192, 3.0, np.float32))


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = weighted()
    tensor = model.graph.initializers["w"].const_value
    save(model, tmp_path / "m.onnx", external_data=True)
    assert model.graph.initializers["w"].const_value is tensor
    save(model, tmp_path / "n.onnx", external_data=False)
    assert model.graph.initializers["w"].const_value is tensor


def test_a_new_version_replaces_model_and_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(weighted(1.0), path, external_data=True)
    save(weighted(2.0), path, external_data=True)
    assert len(list(tmp_path.iterdir())) == 2
    np.testing.assert_array_equal(weight_of(path), np.full(8192, 2.0, np.float32))


def test_saving_over_its_own_source(tmp_path: Path) -> None:
    path = save(weighted(1.0), tmp_path / "m.onnx", external_data=True)
    model = load(path)
    model.graph[0].op_type = "Div"
    save(model, path)
    np.testing.assert_array_equal(weight_of(path), np.full(8192, 1.0, np.float32))
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.full(8192, 1.0, np.float32))


def test_external_weights_stay_external_and_small_ones_stay_inside(tmp_path: Path) -> None:
    path = save(weighted(), tmp_path / "m.onnx", external_data=True)
    (tmp_path / "out").mkdir()
    save(load(path), tmp_path / "out" / "n.onnx")
    assert len(list((tmp_path / "out").glob("*.data"))) == 1
    proto = onnx.load(tmp_path / "out" / "n.onnx", load_external_data=False)
    places = {t.name: t.data_location for t in proto.graph.initializer}
    assert places == {"s": onnx.TensorProto.DEFAULT, "w": onnx.TensorProto.EXTERNAL}


@pytest.mark.parametrize(
    ("target", "complaint"), [("missing/m.onnx", "there is no folder"), (".", "it is a folder")]
)
def test_places_that_cannot_be_written_to(target: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot be written: {complaint}"):
        save(weighted(), tmp_path / target)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(weighted(1.0), tmp_path / "m.onnx", external_data=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "_sync", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save(weighted(2.0), path, external_data=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


WRITER = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from tests.test_storage import weighted
    from onnxopt.storage import save
    models = [weighted(float(i), 1 << 20) for i in (1, 2)]
    print("ready", flush=True)
    while True:
        for model in models:
            save(model, Path({target!r}), external_data=True)
"""


def test_killed_at_any_moment_the_old_or_the_new_model_stands(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    save(weighted(1.0, 1 << 20), target, external_data=True)
    root = str(Path(__file__).parents[1])
    script = textwrap.dedent(WRITER.format(paths=[root], target=str(target)))
    seen = set()
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05 + 0.023 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        weight = weight_of(target)
        assert weight[0] in (1.0, 2.0)
        assert (weight == weight[0]).all()
        onnx.checker.check_model(str(target))
        seen.add(float(weight[0]))
    assert seen <= {1.0, 2.0}


def test_a_link_is_followed_and_modes_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = save(weighted(1.0), tmp_path / "real" / "r.onnx", external_data=True)
    real.chmod(0o640)
    link = tmp_path / "link.onnx"
    link.symlink_to(real)
    save(weighted(2.0), link, external_data=True)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    np.testing.assert_array_equal(weight_of(real), np.full(8192, 2.0, np.float32))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.onnx", "real"]
    assert len(list((tmp_path / "real").iterdir())) == 2


def test_data_that_another_model_stands_on_is_not_removed(tmp_path: Path) -> None:
    path = save(weighted(1.0), tmp_path / "m.onnx", external_data=True)
    (old,) = tmp_path.glob("m.onnx.*.data")
    unrelated = tmp_path / f"m.onnx.{'0' * 16}.data"
    unrelated.write_bytes(b"mine")
    save(weighted(2.0), path, external_data=True)
    assert not old.exists()
    assert unrelated.exists()


def test_threads_can_save_one_model_at_once(tmp_path: Path) -> None:
    model = load(save(weighted(3.0), tmp_path / "source.onnx", external_data=True))

    def write(number: int) -> np.ndarray:
        path = tmp_path / f"{number % 3}.onnx"
        save(model, path)
        return weight_of(path)

    with ThreadPoolExecutor(4) as pool:
        for weight in pool.map(write, range(24)):
            np.testing.assert_array_equal(weight, np.full(8192, 3.0, np.float32))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert Path(tensor.path).name.startswith("source.onnx.")


def test_links_to_nowhere_are_refused_before_the_work(tmp_path: Path) -> None:
    loop = tmp_path / "loop.onnx"
    loop.symlink_to(loop)
    with pytest.raises(ModelError, match="cannot be written"):
        check_target(loop)
    far = tmp_path / "far.onnx"
    far.symlink_to(tmp_path / "missing" / "m.onnx")
    with pytest.raises(ModelError, match="there is no folder"):
        check_target(far)


def stored(folder: Path, *values: float) -> ir.Model:
    """A model of two external weights, one value each, which are multiplied with x in turn."""
    model = load(text_model("agraph (float[65536] x) => (float[65536] y) { a = Neg(x)\n y = Neg(a) }"))
    for node, value, name in zip(model.graph, values, "wv", strict=True):
        array = np.full(65536, value, np.float32)
        array[2000] = 7  # not on any page that is sampled
        weight = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(weight)
        node.op_type = "Mul"
        node.resize_inputs(2)
        node.replace_input_with(1, weight)
    return load(save(model, folder / "m.onnx", external_data=True))


def test_copied_data_is_named_alike_wherever_it_comes_from(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    model = stored(tmp_path / "a", 1.0, 2.0)
    for folder in ("b", "c"):
        save(model, tmp_path / folder / "n.onnx")
    names = [sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("b", "c")]
    assert names[0] == names[1]
    again = load(tmp_path / "b" / "n.onnx")
    save(again, tmp_path / "b" / "n.onnx")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == names[0]
    for name, value in (("w", 1.0), ("v", 2.0)):
        tensor = again.graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.numpy()[0] == value


def test_data_that_the_model_in_memory_reads_is_not_replaced_by_other_data(tmp_path: Path) -> None:
    """Two weights change places that differ nowhere where they are sampled: the name does not show it."""
    first = stored(tmp_path, 1.0, 1.0)
    path = save(first, tmp_path / "n.onnx")
    model = load(path)
    w, v = model.graph.initializers["w"], model.graph.initializers["v"]
    assert isinstance(w.const_value, ir.ExternalTensor)
    with open(w.const_value.path, "rb+") as file:
        file.seek((w.const_value.offset or 0) + 4 * 2000)
        file.write(np.float32(8).tobytes())
    w.const_value, v.const_value = v.const_value, w.const_value
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ModelError, match="the model in memory reads its weights from this file"):
        save(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    save(model, tmp_path / "other.onnx")
    swapped = load(tmp_path / "other.onnx").graph.initializers["v"].const_value
    assert swapped is not None
    assert swapped.numpy()[2000] == 8


def test_only_what_replaces_a_model_is_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[storage.Staged] = []
    monkeypatch.setattr(storage, "_sync", synced.append)
    save(weighted(1.0), tmp_path / "m.onnx", external_data=True)
    assert not synced
    save(weighted(2.0), tmp_path / "m.onnx", external_data=True)
    assert len(synced) == 1


def test_data_of_branches_is_replaced_too(tmp_path: Path) -> None:
    text = """agraph (bool c, float[4096] x) => (float[4096] y) {
        y = If(c) <then_branch = t () => (float[4096] p) { p = Neg(x) },
                   else_branch = e () => (float[4096] q) { q = Abs(x) }>
    }"""
    for value in (1.0, 2.0):
        model = load(text_model(text))
        body = next(iter(model.graph[0].attributes.values())).as_graph()
        weight = ir.Value(name="w", const_value=ir.tensor(np.full(4096, value, np.float32), name="w"))
        body.register_initializer(weight)
        body[0].op_type = "Add"
        body[0].resize_inputs(2)
        body[0].replace_input_with(1, weight)
        save(model, tmp_path / "m.onnx", external_data=True)
    assert len(list(tmp_path.glob("*.data"))) == 1
