"""Sessions: what they take and give, what they refuse, and what they leave behind."""

from __future__ import annotations

import gc
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

import onnxopt.storage
from onnxopt import runtimes
from onnxopt.errors import ModelError, ProviderError, RuntimeMissingError, UsageError
from onnxopt.runtimes import RunError, UnsupportedModelError, open_session, providers, runtime_version


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]>\n' + text)


AFFINE = (
    """affine (float[N, 3] x, float[3] b) => (float[N, 3] y) <float[3] b = {1, 2, 3}> { y = Add(x, b) }"""
)


def test_inputs_outputs_and_overridable_initializers_are_described() -> None:
    with open_session(parse(AFFINE)) as session:
        (x,), (b,), (y,) = session.inputs, session.overridable, session.outputs
    assert (x.name, x.dtype.name, x.shape) == ("x", "float32", ("N", 3))
    assert (b.name, b.dtype.name, b.shape) == ("b", "float32", (3,))
    assert (y.name, y.type, y.shape) == ("y", "tensor(float)", ("N", 3))


@pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])
def test_every_level_runs_and_unknown_feeds_are_left_out(level: runtimes.Level) -> None:
    x = np.ones((2, 3), np.float32)
    with open_session(parse(AFFINE), level=level) as session:
        assert session.run({"x": x, "stranger": x})["y"].tolist() == [[2, 3, 4]] * 2
        assert session.run({"x": x, "b": np.zeros(3, np.float32)})["y"].tolist() == [[1, 1, 1]] * 2


def test_sequences_strings_and_empty_optionals_come_as_they_are() -> None:
    model = parse(
        """g (float[2] x, string[2] t) => (seq(float[2]) s, string[2] u, optional(float[2]) o) {
            s = SequenceConstruct(x, x)
            u = Identity(t)
            o = Optional <type: type_proto = float[2]> ()
        }"""
    )
    words = np.array(["a", "é"], dtype=object)
    with open_session(model) as session:
        out = session.run({"x": np.ones(2, np.float32), "t": words})
    assert [part.tolist() for part in out["s"]] == [[1, 1], [1, 1]]
    assert out["u"].tolist() == ["a", "é"]
    assert out["o"] is None
    assert list(out) == ["s", "u", "o"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("float8e5m2", ml_dtypes.float8_e5m2),
        ("float16", np.float16),
    ],
)
@pytest.mark.parametrize("axes", [2, 0])
def test_types_without_numpy_pass_in_and_out(name: str, dtype: Any, axes: int) -> None:
    shape = "[2, 2]" if axes else ""
    model = parse(
        f"g ({name}{shape} x, float[2] p) => ({name}{shape} y, float[2] q) {{ y = Identity(x) q = Abs(p) }}"
    )
    x = np.array([[0.5, -1], [2, 3]] if axes else 0.5, dtype)
    with open_session(model) as session:
        out = session.run({"x": x, "p": np.array([-1, 2], np.float32)})
    assert (out["y"].dtype, out["y"].shape) == (dtype, x.shape)
    assert out["y"].tobytes() == x.tobytes()
    assert out["q"].tolist() == [1, 2]


def test_a_failed_run_names_the_feed() -> None:
    with (
        open_session(parse(AFFINE)) as session,
        pytest.raises(
            RunError,
            match=r"run on \[x float32\[2, 5\]\] failed: Got invalid dimensions.* Got: 5 Expected: 3",
        ),
    ):
        session.run({"x": np.ones((2, 5), np.float32)})
    with open_session(parse(AFFINE)) as session, pytest.raises(RunError, match="x") as caught:
        session.run({})
    assert "\n" not in str(caught.value)


def test_a_model_without_kernel_is_refused_in_one_line() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Identity(x) z = Identity(y) }")
    model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", "com.example"
    model.opset_import.add(domain="com.example", version=1)
    with pytest.raises(UnsupportedModelError, match=r"onnxruntime cannot open it: .*Frobnicate") as caught:
        open_session(model)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ModelError)


def test_wrong_words_are_answered_with_the_near_ones() -> None:
    with pytest.raises(UsageError, match="did you mean 'cuda'"):
        open_session(parse(AFFINE), provider="cudda")
    with pytest.raises(UsageError, match="did you mean 'basic'"):
        open_session(parse(AFFINE), level="basics")  # type: ignore[arg-type]


def test_cpu_runs_and_the_others_say_why_not() -> None:
    cpu, cuda, tensorrt = providers()
    assert cpu.available
    assert not cpu.reason
    assert (cpu.ep_name, cuda.name, tensorrt.name) == ("CPUExecutionProvider", "cuda", "tensorrt")
    for other in (cuda, tensorrt):
        assert other.available == (not other.reason)
    assert cpu.version == runtime_version()
    assert onnxruntime.__version__ in cpu.version


def test_nodes_are_counted_by_provider() -> None:
    with open_session(parse(AFFINE), level="none") as session:
        assert session.assignment == {"CPUExecutionProvider": 1}


def test_a_provider_the_build_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        ProviderError, match=r"cuda: .* is built without CUDAExecutionProvider.*onnxopt\[gpu\]"
    ):
        open_session(parse(AFFINE), provider="cuda")


class FallsBack:
    """What `onnxruntime.InferenceSession` gives for CUDA where it cannot run: a session on the CPU."""

    taken: tuple[tuple[str, int], ...] = (("CPUExecutionProvider", 3),)
    first = "CPUExecutionProvider"

    def __init__(self, *_: object, **__: object) -> None:
        self.get_inputs = self.get_outputs = self.get_overridable_initializers = list

    def get_providers(self) -> list[str]:
        return [self.first, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(ep_name=n, get_nodes=lambda c=c: [None] * c) for n, c in self.taken]


class TookNone(FallsBack):
    first = "CUDAExecutionProvider"


class TookSome(TookNone):
    taken = (("CUDAExecutionProvider", 2), ("CPUExecutionProvider", 1))


def pretend(monkeypatch: pytest.MonkeyPatch, session: type[FallsBack]) -> None:
    monkeypatch.setattr(runtimes, "_require", lambda ort, provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


@pytest.mark.parametrize(
    ("session", "said"),
    [(FallsBack, "fell back to CPUExecutionProvider"), (TookNone, "took none of 3 nodes")],
)
def test_a_silent_fall_to_the_cpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, session: type[FallsBack], said: str
) -> None:
    pretend(monkeypatch, session)
    with pytest.raises(ProviderError, match=f"cuda: model: {said}"):
        open_session(parse(AFFINE), provider="cuda")


def test_a_provider_that_took_nodes_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, TookSome)
    with open_session(parse(AFFINE), provider="cuda") as session:
        assert session.assignment == {"CUDAExecutionProvider": 2, "CPUExecutionProvider": 1}


def test_a_missing_runtime_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match=r"not installed: pip install 'onnxopt\[cpu\]'"):
        open_session(parse(AFFINE))


def test_two_runtimes_that_overwrote_each_other_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(RuntimeMissingError, match=r"onnxruntime is broken.*pip uninstall both"):
        providers()


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    providers()
    with pytest.raises(ModelError):
        open_session(b"\x08\x0a")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("way", ["close", "drop"])
def test_temporary_files_go_with_the_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(onnxopt.storage, "LARGEST_PROTOBUF", 0)
    session = open_session(ir.from_proto(parse(AFFINE)))
    assert list(tmp_path.iterdir())
    assert session.run({"x": np.zeros((1, 3), np.float32)})["y"].tolist() == [[1, 2, 3]]
    if way == "close":
        session.close()
    del session
    gc.collect()
    assert not list(tmp_path.iterdir())
