"""CPUs that are not here: the numbers they give, and what is said where they cannot be had."""

from __future__ import annotations

import gc
import io
import json
import platform
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxopt import emulation
from onnxopt.cli import main
from onnxopt.emulation import Isa, find_isa, open_emulated, run_emulated
from onnxopt.errors import ProviderError, UsageError
from onnxopt.guest import receive, send
from onnxopt.runtimes import RunError, UnsupportedModelError, open_session
from onnxopt.verification import verify
from tests.support import why_no_emulator

emulated = pytest.mark.skipif(bool(why_no_emulator()), reason=why_no_emulator())

COPIES = """g (float[2] x, string[2] t) => (seq(float[2]) s, string[2] u, optional(float[2]) o) {
    s = SequenceConstruct(x, x)
    u = Identity(t)
    o = Optional <type: type_proto = float[2]> ()
}"""


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["": 21]>\n' + text)


def product(zero: int = 0) -> onnx.ModelProto:
    """255 times 127, 256 times added; of unsigned weights and their zero point the same."""
    kind = "uint8" if zero else "int8"
    model = parse(
        f"""product (float[1, 256] x) => (float[1, 1] y)
            <float s = {{1}}, uint8 z = {{0}}, {kind} zero = {{{zero}}}> {{
            q = QuantizeLinear(x, s, z)
            sum = MatMulInteger(q, w, z, zero)
            y = Cast <to = 1> (sum)
        }}"""
    )
    weight = np.full((256, 1), 127 + zero, np.uint8 if zero else np.int8)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


FULL = {"x": np.full((1, 256), 255, np.float32)}


@pytest.mark.parametrize(
    "value",
    [
        None,
        np.float32(2.5),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.zeros((0, 3), np.float32),
        np.array([True, False]),
        np.array([1.5, -2], ml_dtypes.bfloat16),
        np.array([0.5], ml_dtypes.float8_e4m3fn),
        np.array([[-8, 7]], ml_dtypes.int4),
        [np.ones(2), [np.zeros(1, np.uint8)]],
    ],
)
def test_values_of_all_kinds_pass_through_a_message(value: object) -> None:
    stream = io.BytesIO()
    send(stream, {"file": value, "x": np.ones(1)}, level="all")
    stream.seek(0)
    values, told = receive(stream)
    assert told == {"level": "all"}
    assert list(values) == ["file", "x"]
    pairs = zip(value, values["file"], strict=True) if isinstance(value, list) else [(value, values["file"])]
    for want, have in pairs:
        assert np.asarray(want).dtype == np.asarray(have).dtype
        np.testing.assert_array_equal(want, have)


def test_strings_pass_and_a_message_that_is_cut_off_is_noticed() -> None:
    stream = io.BytesIO()
    send(stream, {"t": np.array([["a", "é\n"]], object), "x": np.ones(3)})
    whole = stream.getvalue()
    assert receive(io.BytesIO(whole))[0]["t"].tolist() == [["a", "é\n"]]
    for size in (0, 5, len(whole) - 1):
        with pytest.raises(EOFError):
            receive(io.BytesIO(whole[:size]))


@emulated
def test_an_emulated_cpu_without_vnni_saturates_and_an_older_one_does_not() -> None:
    (here,) = open_session(product()).run(FULL)["y"].ravel()
    (avx2,) = run_emulated(product(), [FULL])
    (avx,) = run_emulated(product(), [FULL], isa="avx")
    assert here == avx["y"] == 256 * 255 * 127
    assert avx2["y"] == 128 * (2**15 - 1)


@emulated
def test_a_session_gives_all_kinds_of_values_and_outlives_a_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sample = {"x": np.array([1, 2], np.float32), "t": np.array(["a", "é"], object)}
    with open_emulated(parse(COPIES)) as session:
        with pytest.raises(RunError, match=r"avx2: model.onnx: the run on \[\] failed: Required inputs"):
            session.run({})
        out = session.run(sample)
        assert any(tmp_path.iterdir())
    assert [part.tolist() for part in out["s"]] == [[1, 2], [1, 2]]
    assert out["u"].tolist() == ["a", "é"]
    assert out["o"] is None
    assert not any(tmp_path.iterdir())
    with pytest.raises(RunError, match="has ended"):
        session.run(sample)


@emulated
def test_what_goes_wrong_in_the_emulator_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"avx2: model.onnx: onnxruntime cannot open it"):
        open_emulated(b"no model")
    with pytest.raises(RunError, match=r"an emulated Haswell took more than 0\.01 s"):
        open_emulated(product(), timeout=0.01)
    monkeypatch.setitem(emulation.ISAS, "avx2", Isa("avx2", "Abacus"))
    with pytest.raises(RunError, match=r"on an emulated Abacus ended early: .*unable to find CPU model"):
        open_emulated(product())
    gc.collect()
    assert not any(tmp_path.iterdir())


def test_where_no_cpu_can_be_emulated_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"unknown instruction set 'avx512' \(did you mean"):
        find_isa("avx512")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ProviderError, match="avx2: qemu-x86_64 is not installed; apt install qemu-user"):
        verify(product(), product(), isa="avx2")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    with pytest.raises(ProviderError, match="this is Linux on arm64: run it there"):
        find_isa("avx2")


@emulated
def test_a_claim_that_holds_here_can_fail_there() -> None:
    verdict = verify(product(128), product(), feeds=[FULL], kind="exact", isa="avx2")
    assert (verdict.status, verdict.ok) == ("proved", False)
    assert verdict.emulated is not None
    assert verdict.emulated.status == "failed"
    assert verdict.emulated.runtime.endswith("cpu, avx2 emulated (Haswell)")


@emulated
def test_verify_measures_a_lossy_change_on_both_cpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, zero in (("unsigned.onnx", 128), ("signed.onnx", 0)):
        Path(name).write_bytes(product(zero).SerializeToString())
    np.savez("full.npz", x=FULL["x"])
    given = ["verify", "unsigned.onnx", "signed.onnx", "--data", "full.npz", "--kind", "lossy"]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--isa", "avx2", "--json", "v.json"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "y (avx2)" in out
    verdict = json.loads(Path("v.json").read_text())
    assert verdict["outputs"][0]["sqnr"] == "inf"
    assert verdict["emulated"]["status"] == "measured"
    error = 1 - 128 * (2**15 - 1) / (256 * 255 * 127)
    assert verdict["emulated"]["outputs"][0]["max_error"] == pytest.approx(error)
    with pytest.raises(SystemExit) as ended:
        main([*given, "--isa", "avx2", "--provider", "cuda"])
    assert ended.value.code == 2
    assert "an emulated CPU (avx2) is no cuda" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main([*given, "--isa", "avx2"])
    assert ended.value.code == 3
